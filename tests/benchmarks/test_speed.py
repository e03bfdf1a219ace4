"""Ours and the peers do the same work, and every suite gives its rows."""

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks import speed, suites
from benchmarks.peers import effdet_bench, effdet_peer, effdet_targets, same_weights
from benchmarks.rooflines import Ceiling
from benchmarks.timing import Settings
from effseg import InputError
from effseg.data.sample import pad_boxes
from effseg.losses.detection import assign
from effseg.models.boxes import make_anchors

QUICK = Settings(size=64, rounds=1, seconds=0.0)


@pytest.mark.parametrize("name", ["efficientdet_d0", "efficientdet_lite0"])
def test_ours_and_effdets_network_do_the_same_work(name):
    torch.manual_seed(0)
    peer = effdet_peer(name, classes=3, size=128).eval()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):  # at rest they would hide an exchanged level
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    image = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        theirs, ours = peer(image), same_weights(name, peer).eval()(image)
    assert ours.class_logits.shape == (2, 3069, 3) and ours.box_codes.shape == (2, 3069, 4)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_boxes_of_the_suites_are_assigned_alike():
    boxes, labels = suites.random_boxes(2, 256)
    target = effdet_targets(boxes, labels)
    label = effdet_bench("efficientdet_d0", 256).anchor_labeler.batch_label_anchors
    theirs = label(target["bbox"], target["cls"])
    ours = assign(make_anchors((256, 256)), *pad_boxes(boxes, labels))
    assert (ours.labels >= 0).sum(1).tolist() == theirs[2].long().tolist()


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("metrics", ["torchmetrics", "effseg", "torchmetrics"]),
        ("assignment", ["effdet"]),
        ("detections", ["effdet"]),
        ("images", ["Pillow", "decoding"]),
        ("folders", ["Pillow", "decoding"]),
    ],
)
def test_suites(shapes_root, monkeypatch, name, others):
    monkeypatch.setenv("EFFSEG_DATA", str(shapes_root))
    first, *rest = suites.SUITES[name](QUICK)
    assert first["name"].startswith("effseg") and first["ratio"] == 1.0 and first["per_second"] > 0
    for row, word in zip(rest, others, strict=False):
        assert row["name"].startswith(word) and row["ms"] > 0


def test_the_metrics_suite_refuses_a_wrong_count(monkeypatch):
    class Wrong(suites.SegmentationMetrics):
        def update(self, preds, target):
            super().update(preds.flip(0), target)

    monkeypatch.setattr(suites, "SegmentationMetrics", Wrong)
    with pytest.raises(InputError, match="differ"):
        suites.metrics(QUICK)


def test_makers_name_ours_first_and_every_peer():
    names = list(speed.forward_makers("effseg_lite0", QUICK))
    encoder = "tf_efficientnet_lite0"
    assert names[0] == "effseg effseg_lite0" and names[-1] == "effseg effseg_lite0, as built"
    assert {f"smp {d}({encoder})" for d in ("DeepLabV3Plus", "FPN", "Unet", "UPerNet")} < {*names}
    assert {"smp DeepLabV3Plus(resnet101)", "smp Segformer(mit_b2)"} < {*names}
    brief = speed.brief_makers("effseg_lite0", QUICK)
    assert list(brief) == ["effseg effseg_lite0", f"smp DeepLabV3Plus({encoder})"]
    assert len(speed.forward_makers("efficientdet_lite0", QUICK)) == 3
    for make in (speed.forward_makers, speed.training_makers):
        with pytest.raises(InputError, match="resnet18"):
            make("resnet18", QUICK)


@pytest.mark.parametrize("name", ["effseg_lite0", "efficientdet_lite0"])
def test_the_losses_of_a_training_step_have_gradients(name):
    settings = Settings(size=64, batch=2, train=True)
    makers = speed.training_makers(name, settings)
    assert len(makers) == 3
    for make in list(makers.values())[:2]:
        subject = make()
        loss = subject.call()
        loss.backward()
        assert loss.isfinite() and loss > 0
        assert any(p.grad is not None and p.grad.any() for p in subject.model.parameters())


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: True)  # not for the other tests
    monkeypatch.setattr(speed, "measure_ceiling", lambda *arguments: Ceiling(1e15, 1e13))
    return speed.main()


def test_the_command_prints_and_writes_rows(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    quick = ("--size", "64", "--rounds", "1")
    assert run(monkeypatch, "effsegdet_lite0", *quick, "--json", str(path)) == 0
    report = json.loads(path.read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "effseg effsegdet_lite0",
        "its segmenter alone",
        "its detector alone",
        "both alone, one after the other",
    ]
    both, segmenter, detector, two = (row["gmacs"] for row in report["rows"])
    assert segmenter < both < two == pytest.approx(segmenter + detector)
    assert all(0 < row["roofline"] < 1 and row["peak_mib"] > 0 for row in report["rows"])
    assert "of the ceiling" in capsys.readouterr().out
    assert run(monkeypatch, "nothing") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_bfloat16_runs(monkeypatch):
    assert run(monkeypatch, "effseg_lite0", "--size", "64", "--rounds", "1", "--bf16") == 0
