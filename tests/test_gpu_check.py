"""scripts/gpu_check.py, on the CPU and in tiny sizes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(script, monkeypatch):
    """Models that take no time; the second one of a pair fails."""

    def fail():
        raise RuntimeError("broken on\npurpose")

    def networks(name, size):
        return {f"effseg {name}": lambda: torch.nn.Conv2d(3, 21, 1), "peer": fail}

    def losses(name, images):
        model = torch.nn.Conv2d(3, 21, 1)
        return {
            f"effseg {name}": (model, lambda: model(images).mean()),
            "peer": (torch.nn.Conv2d(3, 21, 1), fail),
        }

    monkeypatch.setattr(script, "networks", networks)
    monkeypatch.setattr("effseg.deploy.training.losses", losses)
    monkeypatch.setattr(script, "run_gpu_tests", lambda: script_tests)
    script_tests = {"exit_code": 0, "summary": "9 passed", "failed": []}
    return script_tests


def test_one_line_and_code_2_without_a_gpu(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "no CUDA device" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_model_is_recorded_and_the_others_are_measured(script, tiny, tmp_path):
    assert script.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu-cpu.json", "gpu-cpu.md"]
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    ours, peers = report["rows"][::2], report["rows"][1::2]
    assert [(row["mode"], row["precision"]) for row in ours[::2]] == [
        ("inference", "bf16"),
        ("training", "bf16"),
        ("inference", "fp32"),
    ]
    assert {row["model"] for row in ours} == {"effseg effseg_lite0", "effseg efficientdet_lite0"}
    for row in ours:
        assert row["least"] <= row["images_per_second"] <= row["most"]
        assert row["images_per_second"] > 0
    assert {row["error"] for row in peers} == {"RuntimeError: broken on purpose"}
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert page.count("failed: RuntimeError: broken on purpose") == 6
    assert "9 passed" in page


def test_failed_tests_give_code_1(script, tiny, tmp_path):
    tiny.update(exit_code=1, summary="1 failed", failed=["FAILED tests/test_gpu.py::test_a"])
    assert script.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
    assert "FAILED tests/test_gpu.py::test_a" in (tmp_path / "gpu-cpu.md").read_text()


def test_memory_that_ends_halves_the_batch(script, tiny, monkeypatch, tmp_path):
    batches = []

    def prepare(row, steps, device):
        batches.append(row["batch"])
        if row["batch"] > 2:
            raise torch.OutOfMemoryError("no memory")
        steps["ours"] = lambda: None
        return [{**row, "model": "ours", "peak_mib": 1}]

    monkeypatch.setattr(script, "prepare", prepare)
    options = script.parse(["--device", "cpu", "--quick"])
    case = script.Case("effseg_d0", "inference", "fp32", "eager", 128, 8)
    (row,) = script.measure_pair(case, options)
    assert batches == [8, 4, 2]
    assert row["batch"] == 2 and row["peak_mib"] == 1 and row["images_per_second"] > 0

    def never(row, steps, device):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(script, "prepare", never)
    (row,) = script.measure_pair(case, options)
    assert row["error"] == "out of memory with one photo"


def test_plan_has_the_whole_grid_once_and_compiles_last(script):
    cases = script.plan(script.parse([]))
    assert len(cases) == len(set(cases))
    inference = [case for case in cases if case.mode == "inference"]
    assert len(inference) == 5 * 3 * 3 * 2 * 3
    assert {case.size for case in inference} == {512, 640, 1024}
    assert {case.batch for case in inference} == {1, 8, 32}
    assert {case.model for case in cases if case.mode == "training"} == set(script.MODELS)
    compiles = [case.execution != "eager" for case in cases]
    assert compiles == sorted(compiles)
    assert all(c.execution == "eager" for c in script.plan(script.parse(["--no-compile"])))


@pytest.mark.slow
def test_the_whole_script_on_the_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--output", tmp_path],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert [row.get("error") for row in report["rows"]] == [None] * 14
    assert all(row["images_per_second"] > 0 for row in report["rows"])
    about = report["about"]
    assert about["torch"] == torch.__version__
    assert "--quick" in about["command"] and about["date"] and about["device"] == "cpu"
    if torch.cuda.is_available():
        assert "passed" in report["tests"]["summary"]
    else:
        assert "skipped" in report["tests"]["summary"]
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert page.count("| effseg effseg_lite0 |") == 3
    assert page.count("| smp DeepLabV3Plus(tf_efficientnet_lite0)") == 3
    assert page.count("| effdet efficientdet_lite0") == 4  # in training in both layouts
    assert not list(tmp_path.glob("*.tmp"))
