"""The example of docs/export.md, run as it stands there: without effseg and without torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from effseg import Predictor
from effseg.export.parity import drawn_images
from effseg.inference.engine import Engine
from tests.networks import segmenter

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
ALONE = "\nassert not {'effseg', 'torch'} & set(sys.modules)\n"


def run_example(folder, model, image):
    """Run the example on an image in a folder; return what it printed."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "image.png")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    (folder / "example.py").write_text(code + ALONE)
    command = [sys.executable, "example.py", str(model), "image.png"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout


def test_the_example_of_a_binary_model_and_a_batch(exported, tmp_path):
    model, image = segmenter(classes=1), drawn_images(128)[0]
    logits = Engine(model, "size128").logits([image])[0]
    model.segmentation_head.classifier.bias.data -= logits.median()
    run_example(tmp_path, exported(model, "onnx", size=128, batch=2), image)
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    assert set(np.unique(mask)) == {0, 1}
    assert (mask == (logits[0] > logits.median()).numpy()).mean() >= 0.99


def test_the_example_without_effseg(joint, exported, tmp_path):
    path = exported(joint, "onnx", size=128, batch=1, argmax=True)
    image = drawn_images(128)[0]  # 128 x 96: neither scaled nor padded below
    printed = run_example(tmp_path, path, image)
    x = joint.normalise(image)
    padded = torch.zeros(1, 3, 128, 128)
    padded[0, :, : x.shape[1], : x.shape[2]] = x
    sizes = torch.tensor([x.shape[1:]])
    with torch.no_grad():
        masks = joint.outputs(padded, ("segmentation",), sizes=sizes).masks
    expected = masks.argmax(1)[0, : x.shape[1], : x.shape[2]].numpy()
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "P" and (np.asarray(mask) == expected).mean() >= 0.999
    scores = joint.detect([x], pad_to=128)[0]["scores"]
    lines = printed.splitlines()
    assert len(lines) == int((scores >= 0.3).sum()) > 0
    assert lines[0].split()[-5] == f"{float(scores[0]):.2f}"


@pytest.mark.parametrize("protocol", ["max96", "max500", "short80", "size160", "whole"])
def test_the_example_at_the_scale_of_each_protocol(exported, tmp_path, protocol):
    """The recipe folder saves maxN: at the image's own scale a third of the labels differed."""
    model = segmenter(classes=3)
    path = exported(model, "onnx", size="dynamic")
    set_protocol(path, protocol)
    smooth = Image.fromarray(drawn_images(128)[0].permute(1, 2, 0).numpy()).resize((211, 150))
    image = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)
    run_example(tmp_path, path, image)
    with Image.open(tmp_path / "mask.png") as mask:
        labels = np.asarray(mask)
    expected = Predictor(path)(image).mask.numpy()
    assert len(np.unique(expected)) > 1
    assert (labels == expected).mean() > 0.93


@pytest.mark.parametrize("protocol", ["slide96", "ms+flip"])
def test_the_example_names_protocols_of_several_passes(exported, tmp_path, protocol):
    path = exported(segmenter(classes=3), "onnx", size="dynamic")
    set_protocol(path, protocol)
    with pytest.raises(RuntimeError, match=re.escape(f"protocol {protocol}: windows and")):
        run_example(tmp_path, path, drawn_images(128)[0])


def set_protocol(path, protocol):
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "protocol":
            entry.value = json.dumps(protocol)
    onnx.save(model, path)
