"""effseg validate and prediction with exported files: the scores of the network."""

import os
import re
from pathlib import Path

import pytest
import torch

import effseg
from effseg.data.sources.voc import VOC
from effseg.export.files import export_model
from effseg.inference import backends
from effseg.inference.engine import Engine

TINY = Path(__file__).parents[1] / "conf" / "tiny.yaml"
DATA = os.environ.get("EFFSEG_DATA", "")
IMAGES = 100


@pytest.mark.slow
def test_validate_gives_the_scores_of_the_network(effseg, finished_run, shapes_root, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, file = finished_run / "model", tmp_path / "model.onnx"
    code, _, err = effseg(
        *("export", "--model", model, "--format", "onnx", "--output", file, "--size", 128)
    )
    assert code == 0, err
    command = ("validate", "--config", TINY, f"--data.root={shapes_root}")
    code, network, err = effseg(*command, f"--model.init_from={model}")
    assert code == 0, err
    code, ours, err = effseg(*command, f"--ckpt_path={file}")
    assert code == 0, err
    network = re.sub(r"mIoU without EMA [0-9.]+  ", "", network)  # a file has no second weights
    assert re.search(r"mIoU.*\d", ours) and ours == network


@pytest.mark.slow
@pytest.mark.skipif(not (Path(DATA) / "VOCdevkit").is_dir(), reason="EFFSEG_DATA has no VOC")
def test_miou_of_real_images_is_the_networks(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = effseg.create_model("effseg_lite0", weights="voc").eval()
    export_model(model, tmp_path / "model.onnx", "onnx")
    file = backends.open(tmp_path / "model.onnx")
    source = VOC(root=DATA, masks="val")
    scores = []
    for one in (model, file):
        metrics = effseg.metrics.SegmentationMetrics(num_classes=21, ignore_index=255)
        predictor = Engine(one)
        for i in range(IMAGES):
            (labels,) = predictor.labels([source.image(i)])
            metrics.update(labels, torch.as_tensor(source.labels(i)["mask"]))
        scores.append(float(metrics.compute()["miou"]))
    assert scores[0] > 0.3 and abs(scores[0] - scores[1]) <= 1e-4
