"""Timing in turns, the machine's ceiling, and the benchmark command."""

import json
import time

import pytest
import torch
from torch import nn

from effseg import InputError
from effseg.deploy.ceiling import Ceiling, measure_ceiling, roofline
from effseg.deploy.timing import Timing, ratio, take_turns


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


def test_unknown_model(effseg):
    code, _, err = effseg("benchmark", "resnet18")
    assert code == 2
    assert "effseg_" in err
    code, _, err = effseg("benchmark", "effseg_lite0", "--batch", "0")
    assert code == 2
    assert "batch=0" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["effseg_lite0", "efficientdet_lite0"])
def test_command_prints_and_writes_rows(effseg, tmp_path, name):
    path = tmp_path / "deep" / "rows.json"
    code, out, err = effseg(
        *("benchmark", name, "--size", "128", "--rounds", "1", "--json", str(path))
    )
    assert code == 0, err
    report = json.loads(path.read_text())
    assert report["about"]["torch"] == torch.__version__
    names = [row["name"] for row in report["rows"]]
    assert names[0] == f"effseg {name}" and len(names) >= 3
    assert report["rows"][0]["ratio"] == 1.0
    for row in report["rows"]:
        assert 0 < row["least"] <= row["ms"] <= row["most"]
    assert "GMACs" in out
