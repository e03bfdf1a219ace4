"""The example of docs/export.md, run as it stands there: without effseg and without torch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from effseg.export.parity import drawn_images

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
ALONE = "\nassert not {'effseg', 'torch'} & set(sys.modules)\n"


def test_the_example_without_effseg(joint, exported, tmp_path):
    path = exported(joint, "onnx", size=128, batch=1, argmax=True)
    image = drawn_images(128)[0]  # 128 x 96: neither scaled nor padded below
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(code + ALONE)
    command = [sys.executable, "example.py", str(path), "image.png"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
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
    lines = run.stdout.splitlines()
    assert len(lines) == int((scores >= 0.3).sum()) > 0
    assert lines[0].split()[-5] == f"{float(scores[0]):.2f}"
