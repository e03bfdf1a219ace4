"""Timing in turns, the machine's ceiling, and the benchmark command."""

import json
import time

import pytest
import torch
from torch import nn

from effseg import InputError
from effseg.deploy.ceiling import Ceiling, measure_ceiling, roofline
from effseg.deploy.memory import own_memory, step_memory
from effseg.deploy.peers import detection_bench, detection_peer, same_weights
from effseg.deploy.timing import Timing, ratio, take_turns
from effseg.deploy.training import random_boxes
from effseg.losses.detection import assign, pad_boxes
from effseg.models.boxes import make_anchors
from effseg.models.registry import create_model


def test_steps_take_turns_and_medians_are_kept():
    calls = []

    def step(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    found = take_turns({"a": step("a", 0.02), "b": step("b", 0.01)}, rounds=3, seconds=0.01)
    assert calls[4:] == ["a", "b"] * 3
    assert found["a"].least <= found["a"].median <= found["a"].most
    assert ratio(found["a"], found["b"]) > 1
    assert len(found["b"].rounds) == 3
    with pytest.raises(InputError, match="rounds=0"):
        take_turns({"a": step("a", 0)}, rounds=0)


def test_summary_of_rounds():
    timing = Timing.of([3.0, 1.0, 2.0])
    assert (timing.median, timing.least, timing.most) == (2.0, 1.0, 3.0)


def test_roofline_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2))
    flops = 2 * 4 * 8 * 16 * 16
    moved = 4 * (4 * 256 + 32 + 8 * 256)  # input, weights, output
    pool = 4 * (8 * 256 + 8 * 64)
    photo = torch.zeros(1, 4, 16, 16)
    assert roofline(model, photo, Ceiling(1.0, 1e30)) == pytest.approx(flops)
    assert roofline(model, photo, Ceiling(1e30, 1.0)) == pytest.approx(moved + pool)


def test_ceiling_is_positive():
    ceiling = measure_ceiling(seconds=0.01)
    assert ceiling.flops > 1e8 and ceiling.bandwidth > 1e7


def test_peak_memory_is_what_is_alive_at_once():
    kept = []

    def step():
        first = torch.ones(1000, dtype=torch.float32)
        second = torch.ones(1000, dtype=torch.float64)
        del first
        kept.append(torch.ones(500, dtype=torch.float32) + second[:1].float())

    assert 12_000 <= step_memory(step) < 16_000
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert own_memory(model) == 4 * 110
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert own_memory(model, optimizer) == 3 * 4 * 110


def test_what_cannot_be_measured(effseg):
    for arguments, words in (
        (["resnet18"], "effseg_"),
        (["effseg_lite0", "--batch", "0"], "batch=0"),
        (["metrics", "--rounds", "0"], "rounds=0"),
        (["metrics", "--train"], "without train"),
        (["effsegdet_lite0", "--train"], "effsegdet_lite0"),
        (["effseg_lite0", "--train", "--compile"], "no compile"),
        (["effseg_d99"], "effseg_d99"),
    ):
        code, _, err = effseg("benchmark", *arguments)
        assert code == 2
        assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("metrics", ["torchmetrics", "effseg", "torchmetrics"]),
        ("assignment", ["effdet"]),
        ("detections", ["effdet"]),
        ("photos", ["Pillow", "decoding"]),
        ("folders", ["Pillow", "decoding"]),
    ],
)
def test_suites(effseg, shapes_root, monkeypatch, tmp_path, name, others):
    monkeypatch.setenv("EFFSEG_DATA", str(shapes_root))
    path = tmp_path / "rows.json"
    size = [] if name == "folders" else ["--size", "128"]
    code, out, err = effseg("benchmark", name, *size, "--rounds", "1", "--json", str(path))
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["name"].startswith("effseg") and rows[0]["ratio"] == 1.0
    assert all(row["per_second"] > 0 for row in rows)
    for row, word in zip(rows[1:], others, strict=False):
        assert row["name"].startswith(word)
    assert "a second" in out


def test_boxes_of_the_suites_assign_alike():
    boxes, labels = random_boxes(2, 256, 90)
    bench = detection_bench("efficientdet_d0", 256)
    theirs = bench.anchor_labeler.batch_label_anchors(
        [b[:, [1, 0, 3, 2]] for b in boxes], [x + 1 for x in labels]
    )
    ours = assign(make_anchors((256, 256)), *pad_boxes(boxes, labels))
    positive = (ours.labels >= 0).sum(1)
    assert positive.tolist() == theirs[2].long().tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("effseg_lite0", False),
        ("efficientdet_lite0", False),
        ("effsegdet_lite0", False),
        ("effseg_lite0", True),
        ("efficientdet_lite0", True),
    ],
)
def test_command_prints_and_writes_rows(effseg, tmp_path, name, train):
    path = tmp_path / "deep" / "rows.json"
    more = ["--train", "--batch", "2"] if train else []
    code, out, err = effseg(
        *("benchmark", name, "--size", "128", "--rounds", "1", "--json", str(path), *more)
    )
    assert code == 0, err
    report = json.loads(path.read_text())
    assert torch.__version__.startswith(report["about"]["torch"])
    names = [row["name"] for row in report["rows"]]
    assert names[0] == f"effseg {name}" and len(names) >= 3
    assert report["rows"][0]["ratio"] == 1.0
    for row in report["rows"]:
        assert 0 < row["least"] <= row["ms"] <= row["most"]
    assert ("peak MiB" if train else "GMACs") in out
    if train:
        params = sum(p.numel() for p in create_model(name).parameters())
        assert all(row["peak_mib"] > 3 * 4 * params / 2**20 for row in report["rows"][:1])


@pytest.mark.parametrize("name", ["efficientdet_d0", "efficientdet_lite0"])
def test_ours_and_effdets_network_do_the_same_work(name):
    torch.manual_seed(0)
    peer = detection_peer(name, classes=3, size=128)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):  # at rest they would hide an exchanged level
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    photo = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        theirs, ours = peer(photo), same_weights(name, peer)(photo)
    assert ours.class_logits.shape == (2, 3069, 3) and ours.box_codes.shape == (2, 3069, 4)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
