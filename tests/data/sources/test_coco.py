"""COCO's format: gapped ids, crowds, empty images, masks, and what is wrong with a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effseg import InputError
from effseg.data import COCO
from effseg.data.check import check
from effseg.data.sources import coco_index, coco_json

SIZE = (40, 60)  # H, W
NAMES = {1: "person", 17: "cat", 18: "dog", 88: "teddy bear", 90: "toothbrush"}


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def annotation(number, image, category, x, y, side, **extra):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": square(x, y, side),
    } | extra


def counts(mask):
    """Return COCO's uncompressed run lengths, column by column, zeros first."""
    flat, runs, current = np.asarray(mask).flatten(order="F"), [0], 0
    for value in flat:
        if value != current:
            runs.append(0)
            current = value
        runs[-1] += 1
    return runs


def crowd_mask():
    mask = np.zeros(SIZE, np.uint8)
    mask[30:40, 0:20] = 1
    return mask


ANNOTATIONS = [
    annotation(11, 139, 18, 2, 3, 10),  # dog
    annotation(12, 139, 88, 8, 3, 10),  # teddy bear, over the dog
    annotation(13, 139, 17, 10, 6, 8),  # cat, over both
    annotation(14, 139, 18, 40, 20, 10),
    annotation(15, 139, 18, 45, 25, 10),  # a second dog over the first
    annotation(
        16,
        139,
        1,
        0,
        30,
        0,
        iscrowd=1,
        bbox=[0, 30, 20, 10],
        area=200,
        segmentation={"size": list(SIZE), "counts": counts(crowd_mask())},
    ),
    annotation(17, 7, 90, 50, 30, 20),  # toothbrush, reaches over the edge
]


def write(root, annotations=ANNOTATIONS, names=NAMES, **changes):
    """Write three images (one without objects) and their JSON; return the root."""
    folder = root / "coco2017"
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images = []
    for number in (139, 7, 500):
        name = f"{number:012d}.jpg"
        Image.new("RGB", SIZE[::-1], (number % 256, 0, 0)).save(folder / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
    categories = [{"id": i, "name": name} for i, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories} | changes
    text = json.dumps(content)
    (folder / "annotations" / "instances_val2017.json").write_text(text)
    return root


def val(root, **settings):
    return COCO(root, "val2017", **settings)


def test_ids_with_gaps_crowds_and_images_without_objects(tmp_path):
    data = val(write(tmp_path))
    assert data.ids == ["7", "139", "500"]
    edge, busy, empty = (data.labels(i) for i in range(3))
    # 80 classes without gaps: dog is COCO's 18 and the 17th, teddy bear 88 and the 78th.
    assert busy["labels"].tolist() == [16, 77, 15, 16, 16, 0]
    assert busy["crowd"].tolist() == [False] * 5 + [True]
    assert busy["boxes"][0].tolist() == [2, 3, 12, 13]
    assert busy["area"].tolist() == [100, 100, 64, 100, 100, 200]
    assert edge["boxes"].tolist() == [[50, 30, 60, 40]]  # cut at the image's edge
    assert edge["labels"].tolist() == [79]
    assert empty["boxes"].shape == (0, 4) and empty["mask"].max() == 0
    assert empty["labels"].dtype == torch.int64 and empty["crowd"].dtype == torch.bool
    assert data.classes.names[1 + 16] == "dog"
    assert data.has("detection").tolist() == data.has("segmentation").tolist() == [True] * 3


def test_labels_with_gaps_and_of_the_file(tmp_path):
    root = write(tmp_path)
    gaps = val(root, masks=None, boxes="coco90")
    assert gaps.labels(1)["labels"].tolist() == [17, 87, 16, 17, 17, 0]
    assert len(gaps.classes) == 91
    assert gaps.classes.names[18] == "dog"
    custom = val(root, masks=None, boxes="file")
    assert custom.classes.names == ("background", *NAMES.values())
    assert custom.labels(1)["labels"].tolist() == [2, 3, 1, 2, 2, 0]


def test_a_file_is_cocos_if_ids_and_names_are(tmp_path):
    custom = val(write(tmp_path / "own", names=NAMES | {1: "scratch"}))
    assert custom.classes.names == (
        "background",
        "scratch",
        "cat",
        "dog",
        "teddy bear",
        "toothbrush",
    )
    assert custom.labels(1)["labels"].tolist() == [2, 3, 1, 2, 2, 0]
    assert custom.labels(1)["mask"][4, 3] == 3, "dog is the third category of the file"
    assert custom.card is None and val(write(tmp_path / "coco")).card == "coco2017"
    images = [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}]
    mine = val(write(tmp_path / "mine", [], {1: "person"}, images=images))
    assert mine.classes.names[:2] == ("background", "person") and len(mine.classes) == 81
    assert mine.card is None, "other images than COCO's, whose ids may start at 1 again"
    with pytest.raises(InputError, match="category 1 is 'scratch', expected 'person'"):
        _ = val(tmp_path / "own", masks="coco80").ids
    many = val(write(tmp_path / "many", names=NAMES | {101: "crane"}))
    assert many.classes.names[-1] == "crane", "ids above 90 are the file's own"


def test_more_categories_than_a_mask_can_hold(tmp_path):
    root = write(tmp_path, names=NAMES | {100 + i: f"c{i}" for i in range(250)})
    with pytest.raises(InputError, match="255 categories, expected at most 254 in masks"):
        _ = val(root).classes
    assert len(val(root, masks=None).classes) == 256


def test_masks_of_all_classes(tmp_path):
    mask = val(write(tmp_path), masks="coco80").labels(1)["mask"]
    assert mask.shape == SIZE and mask.dtype == torch.uint8
    assert mask[4, 3] == 17  # dog alone
    assert mask[4, 17] == 78  # teddy bear alone
    assert mask[4, 10] == 255  # dog and teddy bear
    assert mask[10, 15] == 255  # cat over another
    assert mask[13, 17] == 16  # cat alone
    assert mask[27, 47] == 17  # two dogs are dog
    assert mask[35, 5] == 255  # crowd
    assert mask[35, 30] == 0


def test_masks_of_vocs_classes_leave_the_others_to_the_background(tmp_path):
    data = val(write(tmp_path), masks="voc21")
    labels = data.labels(1)
    mask = labels["mask"]
    assert data.classes.names[12] == "dog" and len(data.classes) == 21
    assert mask[4, 3] == 12
    assert mask[4, 10] == 12  # the teddy bear is no class of VOC's
    assert mask[4, 17] == 0
    assert mask[13, 17] == 8
    assert labels["labels"].tolist() == [11, 7, 11, 11, 14], "boxes follow the masks"
    both = val(tmp_path, masks="voc21", boxes="coco80")
    assert both.labels(1)["labels"].tolist() == [16, 77, 15, 16, 16, 0]
    assert len(both.mask_classes) == 21 and len(both.box_classes) == 81
    assert len(val(tmp_path, masks="voc21", min_area=300)) == 1
    with pytest.raises(InputError, match="no image has 9000 pixels"):
        len(val(tmp_path, masks="voc21", min_area=9000))


def test_a_file_without_segmentations_has_boxes_only(tmp_path):
    bare = [{k: v for k, v in a.items() if k != "segmentation"} for a in ANNOTATIONS]
    data = val(write(tmp_path, bare))
    assert data.tasks == ("detection",) and "mask" not in data.labels(1)
    some = val(write(tmp_path, [ANNOTATIONS[3], bare[0]]))
    with pytest.raises(InputError, match="annotation 11: segmentation cannot be drawn"):
        some.labels(1)
    assert len(val(tmp_path, masks=None).labels(1)["boxes"]) == 2


@pytest.mark.parametrize(
    "form", ["string", "sides as text", "swapped", "first part of two corners"]
)
def test_run_lengths_and_polygons_of_other_writers(tmp_path, form):
    from faster_coco_eval.core import mask as coder

    inside = np.zeros(SIZE, np.uint8, order="F")
    inside[5:15, 20:40] = 1
    runs = coder.encode(inside)["counts"]
    written = {
        "string": {"size": list(SIZE), "counts": runs.decode()},
        "sides as text": {"size": [str(side) for side in SIZE], "counts": runs.decode()},
        "swapped": {"size": list(SIZE[::-1]), "counts": counts(inside)},
        "first part of two corners": [[0, 0, 50, 30], [20, 5, 40, 5, 40, 15, 20, 15]],
    }[form]
    data = val(write(tmp_path, [annotation(5, 139, 18, 20, 5, 20, segmentation=written)]))
    if form == "swapped":
        with pytest.raises(InputError, match="annotation 5: segmentation cannot be drawn"):
            data.labels(1)
        return
    assert np.array_equal(data.labels(1)["mask"].numpy() == 17, inside.astype(bool))


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([2, 3, 0, 10], "no area"),
        ([2, 3, -4, 10], "no area"),
        ([70, 3, 5, 5], r"outside its image of 60x40"),
        ([-9, 3, 5, 5], "outside"),
        ([float("nan"), 3, 5, 5], "finite"),
    ],
)
def test_invalid_boxes_are_named_or_dropped(tmp_path, box, words):
    bad = annotation(99, 139, 18, 2, 3, 10, bbox=box)
    root = write(tmp_path, [ANNOTATIONS[0], bad])
    strict = val(root, invalid="error")
    for find in (strict.verify, lambda: strict.labels(1)):
        with pytest.raises(InputError, match=rf"instances_val2017\.json: annotation 99.*{words}"):
            find()
    data = val(root)
    for source in (strict, data):  # a check names what training would drop
        assert ["annotation 99" in problem for problem in check(source).problems] == [True]
    data.verify()
    assert data.labels(1)["area"].tolist() == [100]


def test_numbers_as_text_are_read(tmp_path):
    loose = annotation(5, 139, 18, 2, 3, 10, image_id="139", iscrowd="0", area=None)
    labels = val(write(tmp_path, [loose])).labels(1)
    assert labels["crowd"].tolist() == [False] and labels["area"].tolist() == [100]


def test_broken_files_are_named(tmp_path):
    root = write(tmp_path)
    path = root / "coco2017" / "annotations" / "instances_val2017.json"
    whole = path.read_text()

    def expect(words, **settings):
        with pytest.raises(InputError, match=words):
            val(root, **settings).verify()

    path.write_text(whole[: len(whole) // 2])
    expect(r"instances_val2017\.json: not valid JSON")
    path.write_text(whole[:-1] + "]")
    expect(r"instances_val2017\.json: not valid JSON")
    path.write_text(json.dumps([]))
    expect(r"instances_val2017\.json: not valid JSON")
    path.write_text(json.dumps({"images": []}))
    expect("images is empty or missing")
    write(tmp_path, [annotation(1, 139, 12, 2, 3, 5)])
    expect(r"annotation 1: category_id 12, expected one of \[1, 2", boxes="coco80")
    write(tmp_path, [annotation(1, 3, 18, 2, 3, 5)])
    expect("annotation 1: image_id 3 is not in images")
    write(tmp_path, [annotation(1, 139, 18, 2, 3, 5, bbox=[1, 2])])
    expect(r"annotation 1: bbox \[1, 2\]")
    write(tmp_path, [{"id": 1, "image_id": 139}])
    expect("annotation 1: category_id is missing")
    write(tmp_path, images=[{"id": 7, "file_name": "a", "height": 4, "width": 4}] * 2)
    expect("image id 7 comes twice")
    write(tmp_path, [], images=[])
    expect("images is empty")
    write(tmp_path)
    image = root / "coco2017" / "val2017" / f"{7:012d}.jpg"
    image.unlink()
    expect(r"000000000007\.jpg: image not found")
    Image.new("RGB", (9, 9)).save(image)
    with pytest.raises(InputError, match=r"json: image 7: 60x40 pixels, expected 9x9 as its image"):
        val(root).labels(0, (9, 9))
    with pytest.raises(InputError, match=r"instances_test2017\.json: no such file"):
        COCO(root, "test2017").verify()
    with pytest.raises(InputError, match="no COCO here"):
        COCO(tmp_path / "empty").verify()
    with pytest.raises(InputError, match=r"boxes='coco12'"):
        COCO(root, boxes="coco12")


def test_a_segmentation_that_cannot_be_drawn_is_named(tmp_path):
    root = write(tmp_path, [annotation(5, 139, 18, 2, 3, 5, segmentation={"counts": None})])
    with pytest.raises(InputError, match="annotation 5: segmentation cannot be drawn"):
        val(root, masks="coco80").labels(1)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, indent):
    root = write(tmp_path)
    path = root / "coco2017" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    whole = val(root).index
    # Annotations before the images, other keys of every kind, and pieces of seven characters.
    order = {"info": {"a": [1, {"images": [2]}]}, "year": 2017123456, "licenses": []}
    content = order | {key: content[key] for key in ("annotations", "categories", "images")}
    path.write_text("\ufeff" + json.dumps(content | {"end": -1.5e3}, indent=indent), "utf-8")
    monkeypatch.setattr(coco_json, "_CHUNK", 7)
    pieces = val(root).index
    assert pieces is not whole
    for field in ("image_ids", "files", "sizes", "first", "annotations", "rle"):
        assert np.array_equal(getattr(pieces, field), getattr(whole, field)), field
    runs = [pieces.run_lengths(i) for i in range(7)]
    assert runs == [whole.run_lengths(i) for i in range(7)] and all(runs)


def test_a_file_is_read_once_for_all(tmp_path, monkeypatch):
    root = write(tmp_path)
    first = val(root)
    assert len(first) == 3
    monkeypatch.setattr(coco_index, "entries", lambda *_: pytest.fail("read again"))
    assert val(root, masks="voc21").index is first.index
    monkeypatch.undo()
    write(tmp_path, ANNOTATIONS[:1])  # a file that changed is another
    assert len(val(root).index.annotations) == 1


GROWTH = """
import json, os, sys
from pathlib import Path
from effseg.data.sources.coco_index import read_index
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
before = resident()
index = read_index(Path(sys.argv[1]), masks=True)
print(json.dumps([resident() - before, len(index.files), len(index.annotations), len(index.rle)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_the_index_of_the_full_set_takes_less_than_400_megabytes(tmp_path):
    images, instances = 118_287, 860_001
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 22, endpoint=False)
    path = tmp_path / "instances.json"
    with path.open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "person"}], "images": [')
        rows = (
            f'{{"id": {3 * i}, "file_name": "{3 * i:012d}.jpg", "height": 480, "width": 640}}'
            for i in range(images)
        )
        file.write(",".join(rows))
        file.write('], "annotations": [')
        for i in range(instances):
            # Some 45 numbers a polygon, as in COCO.
            x, y, r = rng.uniform(80, 560), rng.uniform(80, 400), rng.uniform(5, 75)
            radius = r * rng.uniform(0.7, 1.0, len(angle))
            points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)
            numbers = ",".join(f"{value:.2f}" for value in points.ravel())
            box = f"[{x - r:.2f},{y - r:.2f},{2 * r:.2f},{2 * r:.2f}]"
            file.write(
                f'{"," if i else ""}{{"id": {i}, "image_id": {3 * (i * 7 % images)}, '
                f'"category_id": 1, "bbox": {box}, "area": {r * r:.1f}, "iscrowd": 0, '
                f'"segmentation": [[{numbers}]]}}'
            )
        file.write("]}")
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True
    )
    grown, *actual = json.loads(done.stdout)
    assert actual[:2] == [images, instances] and actual[2] > 50_000_000
    assert grown < 400


@pytest.mark.skipif(
    not (Path(os.environ.get("EFFSEG_DATA", "")) / "coco2017" / "annotations").is_dir(),
    reason="real images of COCO are not at EFFSEG_DATA",
)
def test_masks_of_real_images_equal_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    data = COCO(None, "val2017", masks="coco80")
    oracle = coco.COCO(str(data.json))
    value_of = {number: i for i, number in enumerate(sorted(oracle.cats), start=1)}
    for index in range(0, len(data), 8):
        number, size = int(data.ids[index]), data.size(index)
        claims = np.zeros((81, *size), bool)
        crowd = np.zeros(size, bool)
        for entry in oracle.loadAnns(oracle.getAnnIds(number)):
            inside = oracle.annToMask(entry).astype(bool)
            if entry["iscrowd"]:
                crowd |= inside
            else:
                claims[value_of[entry["category_id"]]] |= inside
        expected = np.where(claims.sum(0) == 1, claims.argmax(0), 0)
        expected[(claims.sum(0) > 1) | crowd] = 255
        assert np.array_equal(data.labels(index)["mask"].numpy(), expected), number
