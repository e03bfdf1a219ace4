"""COCO's format as it lies on disk after an export, and what users of other libraries reported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from effseg import InputError
from effseg.cli import main
from effseg.data import COCO
from effseg.data.check import check
from effseg.data.dataset import Dataset
from effseg.metrics.detection import COCOAveragePrecision, VOCAveragePrecision
from tests.data.sources.coco_file import (
    CATEGORIES,
    HEIGHT,
    SQUARE,
    WIDTH,
    image,
    inside,
    instance,
    runs,
    write,
)

PHOTOS = {"images": "photos"}


@pytest.mark.parametrize(
    ("json_at", "folder", "name", "settings"),
    [
        ("annotations/instances_train.json", "train", "1.png", {}),
        ("annotations/instances_train.json", "images/train", "1.png", {}),  # CVAT
        ("annotations/instances_train.json", "images/train", "part/1.png", {}),
        ("annotations/instances_train.json", "images", "1.png", {}),
        ("train/_annotations.coco.json", "train", "1.png", {}),  # Roboflow
        ("result.json", "", "images\\1.png", {"annotations": "result.json"}),  # Label Studio
        ("labels/train.json", "photos", "1.png", {"annotations": "labels/{split}.json"} | PHOTOS),
    ],
)
def test_layouts(tmp_path, json_at, folder, name, settings):
    path = tmp_path / folder / name.replace("\\", "/")
    for each in (path, tmp_path / json_at):
        each.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    content = {"images": [image(1, name)], "annotations": [instance(7)], "categories": CATEGORIES}
    (tmp_path / json_at).write_text(json.dumps(content))
    source = COCO(tmp_path, "train", **settings)
    source.verify()
    assert source.image(0).shape == (3, HEIGHT, WIDTH) and len(source.labels(0)["boxes"]) == 1


def test_boxes_have_more_classes_than_a_mask_can_hold(tmp_path):
    categories = [{"id": number, "name": f"part {number}"} for number in range(1, 301)]
    write(tmp_path, [instance(7, category_id=299)], categories=categories)
    source = COCO(tmp_path, "train", masks=None)
    report = check(source)
    assert report.problems == [] and report.class_boxes.nonzero()[0].tolist() == [299]
    assert Dataset({"parts": source})[0]["labels"].tolist() == [298]


def test_check_lists_everything_and_stops_at_nothing(tmp_path, capsys):
    annotations = [
        instance(10),
        instance(11, segmentation=[[*SQUARE, 3]]),
        instance(12, iscrowd="maybe"),
        instance(13, segmentation={"size": [HEIGHT, WIDTH], "counts": "hello"}),
        instance(14, bbox=[20, 5, 0, 10]),
        instance(15, bbox=[80, 5, 9, 10]),
        instance(16, image_id=9),
        instance(17, image_id=2, area=-1),
        instance(18, image_id=2, category_id=9),
        instance(19, image_id=2),
    ]
    images = [image(1), image(2), image(2, "b.png"), image(3, height=41)]
    write(tmp_path, annotations, images)
    (tmp_path / "train/1.png").write_bytes(b"no image")
    assert main(["data", "check", "--coco", "--root", str(tmp_path), "--split", "train"]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if "json: " in line or ".png: " in line]
    for number in range(11, 19):
        assert sum(f"annotation {number}" in line for line in lines) == 1, number
    for words in (
        "image id 2 comes twice",
        "train/1.png: ",
        "image 3: 60x41 pixels, expected 60x40",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == 11 and "11 problems" in printed.err


def test_check_takes_the_files_categories(tmp_path, capsys):
    persons = [{"id": 1, "name": "person"}]
    write(tmp_path, [instance(7, category_id=1)], categories=persons)
    command = ["data", "check", "--root", str(tmp_path), "--split", "train", "--coco"]
    assert main(command) == 0 and "toothbrush" in capsys.readouterr().out, "the names are COCO's"
    assert main([*command, "file"]) == 0
    assert "toothbrush" not in capsys.readouterr().out
    assert main([*command, "file", "--boxes"]) == 0
    assert main([*command, "coco12"]) == 2
    assert "masks='coco12': expected one of" in capsys.readouterr().err


def test_masks_of_cvats_brush_are_crowds_unless_set_otherwise(tmp_path):
    """CVAT writes what a brush or SAM drew as run lengths with iscrowd 1."""
    drawn = {"size": [HEIGHT, WIDTH], "counts": runs(inside())}
    source = write(tmp_path, [instance(7, iscrowd=1, segmentation=drawn)])
    with pytest.raises(InputError, match=r"all 1 annotations are crowds.*crowds: objects"):
        source.verify()
    assert "are crowds" in check(COCO(tmp_path, "train")).problems[0]
    labels = COCO(tmp_path, "train", crowds="objects").labels(0)
    assert np.array_equal(labels["mask"].numpy(), 2 * inside())
    assert labels["crowd"].tolist() == [False]
    mixed = write(tmp_path, [instance(6, image_id=2), instance(7, iscrowd=1, segmentation=drawn)])
    assert mixed.labels(0)["crowd"].tolist() == [True]
    with pytest.raises(InputError, match="crowds='all': expected one of ignored, objects"):
        COCO(crowds="all")


@pytest.mark.parametrize("command", ["fit", "data check"])
def test_a_file_of_crowds_alone_is_named(tmp_path, capsys, command):
    drawn = {"size": [HEIGHT, WIDTH], "counts": runs(inside())}
    crowds = [instance(n, image_id=n, iscrowd=1, segmentation=drawn) for n in (1, 2)]
    write(tmp_path, crowds)
    arguments = ["data", "check", f"--root={tmp_path}", "--coco", "--split=train"]
    if command == "fit":
        source = "{class_path: effseg.data.COCO, init_args: {split: train}}"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"data: {{train: {{own: {source}}}, crop_size: 64, batch_size: 2}}")
        arguments = ["fit", f"--config={recipe}", f"--data.root={tmp_path}"]
        arguments += [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "all 2 annotations are crowds, which teach nothing" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


def test_a_rotated_box_of_cvat_becomes_the_box_around_it(tmp_path):
    """As cvat-ai/cvat issue 4745 has it: the angle is an attribute, the box is not turned."""
    turned = {"segmentation": [], "bbox": [20, 10, 20, 10]}
    angles = [0.0, 90.0, "90", 270]
    annotations = [
        instance(n, **turned, attributes={"occluded": False, "rotation": angle})
        for n, angle in enumerate(angles, start=1)
    ]
    boxes = write(tmp_path, annotations).labels(0)["boxes"]
    assert boxes[0].tolist() == [20, 10, 40, 20]
    expected = torch.tensor([[25.0, 5.0, 35.0, 25.0]]).expand(3, 4)
    torch.testing.assert_close(boxes[1:], expected)
    polygon = write(tmp_path, [instance(5, attributes={"rotation": 90})])
    assert polygon.labels(0)["boxes"].tolist() == [[20, 5, 40, 15]], "is around it already"
    for wrong in ("left", float("nan")):
        bad = instance(6, **turned, attributes={"rotation": wrong})
        with pytest.raises(InputError, match="annotation 6: rotation"):
            write(tmp_path, [bad]).verify()


def test_a_size_without_the_exif_rotation_is_explained(tmp_path):
    source, exif = write(tmp_path, [instance(7)]), Image.Exif()
    exif[274] = 8
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train" / "1.png", exif=exif)
    with pytest.raises(InputError, match=r"60x40 pixels, expected 40x60 .* turned by its EXIF tag"):
        source.labels(0, tuple(source.image(0).shape[1:]))


def test_an_empty_object_of_coco_annotator_is_dropped(tmp_path):
    nothing = {"segmentation": [], "bbox": [0, 0, 0, 0], "area": 0, "iscrowd": False}
    source = write(tmp_path, [instance(6), instance(7) | nothing])
    source.verify()
    labels = source.labels(0)
    assert len(labels["boxes"]) == 1 and np.array_equal(labels["mask"].numpy(), 2 * inside())


@pytest.mark.parametrize("numbers", [[0, 1], [5, 5]])
@pytest.mark.parametrize("metric", [COCOAveragePrecision, VOCAveragePrecision])
def test_the_truth_scores_1_whatever_its_ids(tmp_path, metric, numbers):
    """pycocotools takes a match with annotation 0 for none, and loses one of two equal numbers."""
    categories = [{"id": 0, "name": "scratch"}, {"id": 1, "name": "dent"}]
    annotations = [
        instance(numbers[0], image_id=0, category_id=0),
        instance(numbers[1], image_id=1, category_id=0, bbox=[1, 2, 30, 30]),
    ]
    source = write(tmp_path, annotations, [image(0), image(1)], categories)
    scores = metric(2)
    for index in range(2):
        truth = source.labels(index)
        actual = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.ones(1)}
        scores.update([actual], [{key: truth[key] for key in ("boxes", "labels", "crowd", "area")}])
    assert float(scores.compute()["ap50"]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "/home/somebody/photos/1.png",
        "..\\..\\label-studio\\media\\upload\\4\\1.png",
        "https://host.example/data/1.png",
        "images/1/1.png",
    ],
)
def test_names_with_folders_of_another_machine(tmp_path, name):
    source = write(tmp_path, [instance(7)], [image(2), image(3)])
    path = tmp_path / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    content["images"] = [image(3), image(1, name)]
    path.write_text(json.dumps(content))
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train/1.png")
    source = COCO(tmp_path, "train")
    source.verify()
    assert source.image_path(0) == tmp_path / "train/1.png"
    # Two images that share the name stand for no file.
    content["images"] = [image(3), image(1, name), image(4, "elsewhere/1.png")]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1\.png: image not found \(2 of 3"):
        COCO(tmp_path, "train").verify()
