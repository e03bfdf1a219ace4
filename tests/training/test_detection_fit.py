"""Detectors through the real command line: fit, validate, predict, and what is wrong with data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import effseg as library
from effseg.data.classes import Classes
from effseg.losses.detection import IGNORED, assign
from effseg.losses.targets import stack_targets
from tests.training.runs import logged

TINY = Path(__file__).parents[1] / "conf" / "tiny_detection.yaml"


def fit(effseg, run, *more):
    return effseg("fit", f"--config={TINY}", f"--trainer.default_root_dir={run}", *more)


@pytest.fixture(scope="module")
def detector_run(tmp_path_factory, shapes_root):
    from effseg.cli import main

    run = tmp_path_factory.mktemp("detector") / "run"
    arguments = [f"--config={TINY}", f"--data.root={shapes_root}"]
    assert main(["fit", *arguments, f"--trainer.default_root_dir={run}"]) == 0
    return run


def test_run_directory_is_complete(detector_run):
    names = {str(p.relative_to(detector_run)) for p in detector_run.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert {"model/config.json", "model/model.safetensors"} <= names
    assert len([name for name in names if name.startswith("pictures/")]) == 3
    assert len(logged(detector_run, "val/ap50")) == len(logged(detector_run, "val/ap50_raw")) == 2
    names = ("loss", "classes", "boxes")
    losses, *terms = (logged(detector_run, f"train/{name}") for name in names)
    total = [classes + 50 * boxes for classes, boxes in zip(*terms, strict=True)]
    assert losses == pytest.approx(total, rel=1e-4)
    assert losses[-1] < losses[0]


def test_validate_repeats_the_score_and_writes_results(effseg, detector_run, shapes_root, tmp_path):
    results = tmp_path / "deep" / "results.json"
    code, out, _ = effseg(
        "validate",
        f"--config={detector_run / 'config.yaml'}",
        f"--ckpt_path={detector_run / 'checkpoints' / 'best.ckpt'}",
        f"--model.detection.results={results}",
    )
    assert code == 0
    printed = float(re.search(r"AP50 (\d\.\d{4})", out)[1])
    assert printed == pytest.approx(max(logged(detector_run, "val/ap50")), abs=1e-4)
    assert "protocol: size96" in out
    assert all(name in out for name in Classes.from_card("shapes").names[1:])
    actual = json.loads(results.read_text())
    ids = {p.stem for p in (shapes_root / "JPEGImages").glob("val*")}
    assert {row["image_id"] for row in actual} == ids
    assert {row["category_id"] for row in actual} <= set(range(1, 7))
    for row in actual:
        x, y, width, height = row["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 96.01 and y + height <= 64.01
    assert not list(results.parent.glob("*.tmp"))


def test_predict_draws_boxes_and_lists_them(effseg, detector_run, shapes_root, tmp_path):
    images = sorted((shapes_root / "JPEGImages").glob("val*"))
    out = tmp_path / "out"
    code, text, _ = effseg(
        *("predict", "--model", detector_run, "--output", out, "--score", "0"), *images
    )
    assert code == 0
    assert "3 images" in text
    actual = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [Path(entry["file"]) for entry in actual] == images
    known = Classes.from_card("shapes").names[1:]
    for entry, image in zip(actual, images, strict=True):
        assert len(entry["annotations"]) == 100
        assert {box["name"] for box in entry["annotations"]} <= set(known)
        drawn = np.asarray(Image.open(out / "overlays" / f"{image.stem}.jpg"))
        plain = np.asarray(Image.open(image))
        assert drawn.shape == plain.shape
        assert np.abs(drawn.astype(int) - plain).mean() > 5
    model = library.from_pretrained(detector_run).eval()
    from effseg.data.files import read_image
    from effseg.inference.engine import Engine

    alone = Engine(model).detect([read_image(images[0])])[0]
    scores = [box["score"] for box in actual[0]["annotations"]]
    assert scores == pytest.approx(alone["scores"].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--protocol=ms+flip",), ["ms+flip", "detector"]),
        (("--protocol=slide64",), ["slide64", "detector"]),
        (("--score", "2"), ["score", "2"]),
    ],
)
def test_predict_refuses_what_detectors_have_not(
    effseg, detector_run, shapes_root, tmp_path, flags, words
):
    out = tmp_path / "out"
    images = shapes_root / "JPEGImages"
    code, _, err = effseg("predict", "--model", detector_run, "--output", out, *flags, images)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert not out.exists()


def test_score_is_for_detectors(effseg, finished_run, shapes_root, tmp_path):
    arguments = ("--model", finished_run, "--output", tmp_path / "out", "--score", "0.5")
    code, _, err = effseg("predict", *arguments, shapes_root / "JPEGImages")
    assert code == 2
    assert "--score" in err


def test_resumed_run_continues(effseg, shapes_root, tmp_path):
    run = tmp_path / "run"
    root = f"--data.root={shapes_root}"
    assert fit(effseg, run, root, "--trainer.max_epochs=1")[0] == 0
    last = run / "checkpoints" / "last.ckpt"
    assert fit(effseg, run, root, f"--ckpt_path={last}")[0] == 0
    assert torch.load(last, weights_only=True)["epoch"] == 1


def test_starts_from_effdet_weights_with_fresh_predictor(effseg, shapes_root, tmp_path):
    arguments = {
        "encoder_name": "tu-test_efficientnet",
        "decoder_channels": 16,
        "decoder_layers": 2,
        "head_layers": 1,
    }
    model = library.create_model("efficientdet_lite0", classes=90, **arguments)
    torch.save(library.to_effdet(model), tmp_path / "d.pth")
    run = tmp_path / "run"
    more = ("--trainer.max_epochs=1", "--model.ema_decay=0", "--model.optim.lr=1e-9")
    code, out, _ = fit(
        effseg, run, f"--data.root={shapes_root}", f"--model.init_from={tmp_path / 'd.pth'}", *more
    )
    assert code == 0
    assert "2 tensors start fresh: detection_head.class_net.predict.pointwise" in out
    trained = library.from_pretrained(run).state_dict()
    key = "detection_head.box_net.predict.pointwise.weight"
    torch.testing.assert_close(trained[key], model.state_dict()[key], atol=1e-5, rtol=0)


def test_segmentation_starts_from_a_detectors_trunk(effseg, detector_run, shapes_root, tmp_path):
    tiny = TINY.with_name("tiny.yaml")
    run = tmp_path / "run"
    code, out, _ = effseg(
        *("fit", f"--config={tiny}", f"--data.root={shapes_root}"),
        *(f"--trainer.default_root_dir={run}", "--trainer.max_epochs=1"),
        *("--model.optim.lr=1e-9", f"--model.init_from={detector_run}", "--model.ema_decay=0"),
    )
    assert code == 0
    assert "start fresh" in out
    ours = library.from_pretrained(run).state_dict()
    theirs = library.from_pretrained(detector_run).state_dict()
    # Level 5's bottom-up node: number 8 over P2 to P7, number 5 over P3 to P7.
    for mine, other in ((0, 0), (3, 3), (6, 4), (7, 5)):
        key = "decoder.cells.0.nodes.{}.conv.depthwise.weight"
        torch.testing.assert_close(
            ours[key.format(mine)], theirs[key.format(other)], atol=1e-5, rtol=0
        )


def test_detection_starts_from_a_segmenters_encoder(effseg, finished_run, shapes_root, tmp_path):
    segmenter = library.from_pretrained(finished_run)
    run = tmp_path / "run"
    code, out, err = fit(
        *(effseg, run, f"--data.root={shapes_root}", f"--model.init_from={finished_run}"),
        f"--model.model_args.encoder_name={segmenter.config['encoder_name']}",
        *("--model.optim.lr=1e-9", "--model.ema_decay=0", "--trainer.max_epochs=1"),
    )
    assert code == 0, err
    assert "tensors start fresh: decoder." in out
    ours, theirs = library.from_pretrained(run), segmenter.encoder.state_dict()
    for key, parameter in ours.encoder.named_parameters():
        torch.testing.assert_close(parameter.data, theirs[key], atol=1e-5, rtol=0, msg=key)


def test_crowds_make_anchors_count_nowhere():
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]])
    targets = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10], [45, 45, 70, 70]]),
            "labels": torch.tensor([3, 1]),
            "crowd": torch.tensor([False, True]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    batch = stack_targets(targets, torch.zeros(2, 3, 64, 64))
    targets = assign(anchors, *(batch[key] for key in ("boxes", "labels", "ignored")))
    assert targets.labels.tolist() == [[3, IGNORED, -1], [-1, -1, -1]]


# Bad input


def coco_copy(root, count=4):
    """Write a COCO folder of generated images, one box each; return the parsed train JSON."""
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            name = f"{split}_{i}.jpg"
            Image.new("RGB", (96, 64), (40 * i, 90, 30)).save(root / split / name)
            images.append({"id": 10 + i, "file_name": name, "width": 96, "height": 64})
            box = {"id": i, "image_id": 10 + i, "category_id": 18, "bbox": [5, 6, 30, 20]}
            annotations.append(box | {"area": 600, "iscrowd": 0})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        }
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return content


def coco_data(root, boxes, invalid="drop"):
    """Return the arguments that put COCO data in place of the miniature."""
    arguments = f"masks: null, boxes: {boxes}, invalid: {invalid}"
    for key, split in (("train", "train2017"), ("val", "val2017")):
        source = f"{{class_path: effseg.data.COCO, init_args: {{split: {split}, {arguments}}}}}"
        yield f"--data.{key}={{coco: {source}}}"
    yield f"--data.root={root}"


def broken(root, defect):
    coco_copy(root)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    if defect == "outside":
        content["annotations"][1]["bbox"] = [200, 6, 30, 20]
    if defect == "zero width":
        content["annotations"][1]["bbox"] = [5, 6, 0, 20]
    if defect == "nan":
        content["annotations"][1]["bbox"] = [5, float("nan"), 30, 20]
    if defect == "category":
        content["annotations"][1]["category_id"] = 12
    text = json.dumps(content)
    path.write_text(text[: len(text) // 2] if defect == "cut" else text)
    if defect == "image":
        (root / "train2017" / "train2017_1.jpg").unlink()


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("outside", ["instances_train2017.json", "annotation 1", "outside"]),
        ("zero width", ["instances_train2017.json", "annotation 1", "no area"]),
        ("nan", ["instances_train2017.json", "annotation 1", "finite"]),
        ("category", ["instances_train2017.json", "category_id 12"]),
        ("cut", ["instances_train2017.json"]),
        ("image", ["train2017_1.jpg"]),
    ],
)
def test_defects_of_coco_data_are_one_line(effseg, tmp_path, defect, words):
    broken(tmp_path / "coco", defect)
    run = tmp_path / "run"
    code, _, err = fit(effseg, run, *coco_data(tmp_path / "coco", "coco80", "error"))
    assert code == 2, err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not run.exists()


def test_coco_from_fit_to_results(effseg, tmp_path):
    coco_copy(tmp_path / "coco")
    results = tmp_path / "results.json"
    code, out, _ = fit(
        effseg,
        tmp_path / "run",
        *coco_data(tmp_path / "coco", "file"),
        "--data.batch_size=2",
        *("--model.detection.metric=coco", f"--model.detection.results={results}"),
        "--trainer.max_epochs=1",
    )
    assert code == 0
    assert "AP50" in out and "dog" in out
    actual = json.loads(results.read_text())
    assert {row["image_id"] for row in actual} == {10, 11, 12, 13}
    assert {row["category_id"] for row in actual} <= {1, 18}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.model=effsegdet_d9"], ["effsegdet_d9", "efficientdet_"]),
        (["--model.detection={gama: 1}"], ["gama"]),
        (["--model.detection.size=8"], ["size", "8"]),
        (["--model.detection.metric=mAP"], ["mAP"]),
        (["--model.init_from=/no/such.pth"], ["/no/such.pth"]),
        (["--data.scale=[2, 1]"], ["scale"]),
    ],
)
def test_bad_settings_are_one_line(effseg, shapes_root, tmp_path, arguments, words):
    run = tmp_path / "never"
    code, _, err = fit(effseg, run, f"--data.root={shapes_root}", *arguments)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not run.exists()


@pytest.mark.parametrize("flags", [("--boxes",), ()])
def test_data_check_counts_boxes(effseg, shapes_root, flags):
    code, out, _ = effseg("data", "check", "--root", shapes_root, "--split", "val", *flags)
    assert code == 0
    assert ("boxes" in out) == bool(flags)


def test_data_check_of_coco(effseg, tmp_path):
    coco_copy(tmp_path / "coco")
    arguments = ("data", "check", "--coco", "--boxes", "--root", tmp_path / "coco")
    code, out, _ = effseg(*arguments)
    assert code == 0
    assert "dog" in out
    shutil.rmtree(tmp_path / "coco" / "val2017")
    code, out, err = effseg(*arguments)
    assert code == 2 and "4 problems" in err
    assert all(f"val2017_{i}.jpg" in out for i in range(4))
