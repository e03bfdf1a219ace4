"""effseg benchmark MODEL."""

import json
import sys

import pytest
import torch

from effseg import EffSeg
from effseg.benchmark import benchmark
from effseg.export.files import export_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    EffSeg("resnet18", encoder_weights=None, classes=3, decoder_channels=16).save_pretrained(folder)
    return folder


@pytest.fixture
def no_engines(monkeypatch):
    """As where the extra is not installed."""
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_saved_model_by_every_engine(effseg, saved):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    command = ("benchmark", saved, "--size", 64, "--batch", 2, "--rounds", 1)
    code, out, err = effseg(*command, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["size"], report["batch"], report["torch"]) == (64, 2, torch.__version__)
    names = [row["name"] for row in report["rows"]]
    assert names == ["as built", "optimised", "ONNX Runtime", "OpenVINO"]
    weights = 4 * sum(p.numel() for p in EffSeg.from_pretrained(saved).parameters()) / 2**20
    for row in report["rows"]:
        assert 0 < row["least"] <= row["ms"] <= row["most"]
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        assert 0.9 * weights < row["size_mib"] < 1.3 * weights
        assert row["agreement"] >= 0.999
    for row in report["rows"][:2]:
        assert 0.9 * weights < row["peak_mib"] < 2 * weights
    assert report["notes"] == []


def test_what_is_not_installed_is_a_line(effseg, saved, no_engines):
    code, out, _ = effseg("benchmark", saved, "--size", 64, "--rounds", 1)
    assert code == 0 and "agreement" in out and "optimised" in out
    assert "ONNX Runtime: onnxruntime is not installed, expected: pip install" in out
    assert "OpenVINO: openvino is not installed" in out


def test_an_exported_file_alone(effseg, saved, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    export_model(EffSeg.from_pretrained(saved), path, "onnx", size=96, batch=1, compare=False)
    path.with_suffix(".pt2").write_bytes(bytes(1 << 20))  # not part of the ONNX file
    code, out, err = effseg("benchmark", path, "--rounds", 1, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["size"] == 96 and [row["name"] for row in report["rows"]] == ["onnx"]
    assert report["rows"][0]["size_mib"] == path.stat().st_size / 2**20


@pytest.mark.parametrize("flags", [("--device", "cuda"), ("--compile",)])
def test_a_file_runs_on_the_cpu_as_it_is(effseg, flags):
    code, _, err = effseg("benchmark", "model.onnx", *flags)
    assert code == 2 and err.count("\n") == 1 and "model.onnx: an exported file runs on" in err


def test_a_detector_is_timed_at_its_size(monkeypatch, no_engines):
    shapes = []
    monkeypatch.setattr(
        "effseg.benchmark.alternate", lambda steps, rounds, device: shapes.append(steps) or {}
    )
    assert benchmark("efficientdet_lite0")["size"] == 320
    assert benchmark("effseg_lite0")["size"] == 512
    assert list(shapes[0]) == ["as built", "optimised"]


@pytest.mark.slow
def test_compiled_is_another_row(saved, no_engines):
    report = benchmark(str(saved), size=64, rounds=1, compile=True)
    assert [row["name"] for row in report["rows"]] == ["as built", "optimised", "compiled"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing-there"], "nothing-there"),
        (["effseg_lite0", "--batch", "0"], "batch=0"),
        (["effseg_lite0", "--size", "0"], "size=0"),
        (["effseg_lite0", "--rounds", "0"], "rounds=0"),
    ],
)
def test_what_cannot_be_measured(effseg, arguments, words):
    code, _, err = effseg("benchmark", *arguments)
    assert code == 2
    assert words in err and err.count("\n") == 1
