"""COCO results JSON and AP on the real val2017 images, against pycocotools."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effseg import InputError, resources
from effseg.data import COCO, VOC, Classes, ImageDataModule
from effseg.data.dataset import Dataset
from effseg.metrics.detection import COCOAveragePrecision
from effseg.training.results import write_results


def with_empty_images(root):
    """Link the real val2017, and take every tenth image's annotations away."""
    real = Path(os.environ["EFFSEG_DATA"]) / "coco2017"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").symlink_to(real / "val2017")
    content = json.loads((real / "annotations" / "instances_val2017.json").read_text())
    bare = {image["id"] for image in content["images"][::10]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in bare]
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.mark.skipif(
    not (Path(os.environ.get("EFFSEG_DATA", "")) / "coco2017" / "annotations").is_dir(),
    reason="real images of COCO are not at EFFSEG_DATA",
)
@pytest.mark.parametrize("labels", ["coco80", "coco90"])
def test_ap_on_real_images_equals_pycocotools(tmp_path, labels):
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    source = COCO(with_empty_images(tmp_path / "coco"), "val2017", masks=None, boxes=labels)
    data = Dataset({"coco": source})
    label_of = {category: label for label, category in source.categories.items()}
    rng = np.random.default_rng(0)
    classes = len(data.classes) - 1
    metric, actual = COCOAveragePrecision(classes), []
    crowds = empty = 0
    for index in range(len(data)):
        sample = data[index]
        truth = sample["boxes"].numpy()
        crowds += int(sample["crowd"].sum())
        empty += len(truth) == 0
        keep = rng.random(len(truth)) < 0.8
        moved = truth[keep] + rng.normal(0, 5, truth[keep].shape)
        extra = np.concatenate([moved[: len(moved) // 3] + 4, rng.uniform(0, 200, (3, 4))])
        boxes = np.concatenate([moved, extra])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        named = np.concatenate(
            [
                sample["labels"].numpy()[keep],
                rng.choice(sorted(source.categories), len(extra)),
            ]
        )
        result = {
            # Numbers that the file keeps as they are.
            "boxes": torch.tensor(np.round(boxes * 8) / 8).float(),
            "scores": torch.tensor(rng.integers(1, 1000, len(boxes)) / 1000).float(),
            "labels": torch.tensor(named),
        }
        actual.append((sample["id"], result))
        metric.update([result], [{k: sample[k] for k in ("boxes", "labels", "crowd", "area")}])
    assert crowds > 0 and empty > 0
    write_results(tmp_path / "results.json", actual, source.categories)
    oracle = coco.COCO(str(source.json))
    run = evaluation.COCOeval(oracle, oracle.loadRes(str(tmp_path / "results.json")), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    scores = metric.compute()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for name, value in zip((*names, "ar100"), (*run.stats[:6], run.stats[8]), strict=True):
        assert float(scores[name]) == pytest.approx(value, abs=1e-6), name
    assert 0.1 < run.stats[0] < 0.9
    precision = run.eval["precision"][..., 0, -1]  # IoU, recall, category
    for row, category in enumerate(run.params.catIds):
        expected = precision[:, :, row]
        value = float(scores["ap_class"][label_of[category]])
        if (expected < 0).all():
            assert np.isnan(value)
        else:
            assert value == pytest.approx(expected.mean(), abs=1e-6)


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"results\.json: cannot be written"):
        write_results(tmp_path / "file" / "results.json", [])


def test_categories_follow_the_label_space(tmp_path):
    card = resources.load_yaml(resources.find("datasets", "coco2017"))
    ids = {entry["name"]: entry["id"] for entry in card["classes"][1:]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val2017" / "1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 8}],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    other = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch"}
    other |= {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv"}
    val = {
        "coco": COCO(tmp_path, "val2017", masks="voc21", boxes="coco80"),
        "voc": VOC(masks="val", boxes="seg_val"),
    }
    actual = ImageDataModule(val=val, space="voc").val_sources
    expected = [ids[other.get(name, name)] for name in Classes.from_card("voc2012").names[1:]]
    assert actual["coco"]["categories"] == expected
    assert actual["voc"]["categories"] == []
    only = ImageDataModule(
        val={"coco": COCO(tmp_path, "val2017", masks=None, boxes="coco90")}
    ).val_sources
    assert only["coco"]["categories"][17] == 18 and only["coco"]["categories"][11] == 0
