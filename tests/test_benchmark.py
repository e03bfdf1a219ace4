"""effseg benchmark MODEL."""

import json

import pytest
import torch

from effseg import EffSeg
from effseg.benchmark import benchmark


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    EffSeg("resnet18", encoder_weights=None, classes=3, decoder_channels=16).save_pretrained(folder)
    return folder


def test_a_saved_model_as_built_and_optimised(effseg, saved):
    command = ("benchmark", saved, "--size", 64, "--batch", 2, "--rounds", 1)
    code, out, err = effseg(*command, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["size"], report["batch"], report["torch"]) == (64, 2, torch.__version__)
    assert [row["name"] for row in report["rows"]] == ["as built", "optimised"]
    weights = 4 * sum(p.numel() for p in EffSeg.from_pretrained(saved).parameters()) / 2**20
    for row in report["rows"]:
        assert 0 < row["least"] <= row["ms"] <= row["most"]
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        assert 0.9 * weights < row["peak_mib"] < 2 * weights
    code, out, _ = effseg(*command)
    assert code == 0 and "images per second" in out and "optimised" in out


def test_a_detector_has_its_own_size(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        "effseg.benchmark.alternate", lambda steps, rounds, device: shapes.append(steps) or {}
    )
    assert benchmark("efficientdet_lite0")["size"] == 320
    assert benchmark("effseg_lite0")["size"] == 512
    assert list(shapes[0]) == ["as built", "optimised"]


@pytest.mark.slow
def test_compiled_is_a_row_of_its_own(saved):
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
