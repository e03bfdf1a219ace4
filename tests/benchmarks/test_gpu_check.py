"""`make gpu-check` on the CPU, in tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, speed
from benchmarks.timing import Subject

ROOT = Path(__file__).parent.parent.parent
QUICK = ("--device", "cpu", "--quick", "--output")


@pytest.fixture
def tests(monkeypatch):
    """Models that take no time, of which the peers fail; and the outcome of the gpu tests."""

    def fail():
        raise RuntimeError("broken on\npurpose")

    def makers(name, settings):
        model = torch.nn.Conv2d(3, 21, 1)
        images = speed.make_images(settings, 16).float()
        return {
            f"effseg {name}": lambda: Subject(model, lambda: model(images).mean()),
            "peer": fail,
        }

    monkeypatch.setattr(speed, "brief_makers", makers)
    monkeypatch.setattr(speed, "training_makers", makers)
    outcome = {"exit_code": 0, "summary": "9 passed", "failed": []}
    monkeypatch.setattr(gpu_check, "run_gpu_tests", lambda marked: {"marked": marked, **outcome})
    return outcome


def test_one_line_and_code_2_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "no CUDA device" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_one_line_and_code_2_without_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "not_there"))
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == "gpu-check: cannot run, not installed: not_there\n"


def test_a_failing_peer_is_recorded_and_ours_is_measured(tests, tmp_path):
    assert gpu_check.main([*QUICK, str(tmp_path)]) == 0
    (path,) = tmp_path.glob("gpu-*.json")
    report = json.loads(path.read_text())
    ours, peers = report["rows"][::2], report["rows"][1::2]
    assert [(row["mode"], row["precision"]) for row in ours[::2]] == [
        ("inference", "bf16"),
        ("training", "bf16"),
        ("inference", "fp32"),
    ]
    assert {row["name"] for row in ours} == {"effseg effseg_lite0", "effseg efficientdet_lite0"}
    assert all(row["per_second"] > 0 and row["peak_mib"] > 0 for row in ours)
    assert {row["error"] for row in peers} == {"RuntimeError: broken on purpose"}
    page = path.with_suffix(".md").read_text()
    assert page.count("RuntimeError: broken on purpose") == 6
    assert page.count("9 passed") == 1 and "- tests marked gpu and not slow" in page
    assert "--quick" not in page.split("| network")[1]


def test_failed_tests_give_code_1(tests, tmp_path):
    tests.update(exit_code=1, summary="1 failed", failed=["FAILED tests/test_gpu.py::test_a"])
    assert gpu_check.main([*QUICK, str(tmp_path)]) == 1
    assert "FAILED tests/test_gpu.py::test_a" in next(tmp_path.glob("*.md")).read_text()


def test_tests_that_compile_come_last(tests, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "plan", lambda options: [])
    arguments = ["--device", "cpu", "--output", str(tmp_path)]
    assert gpu_check.main(arguments) == 0
    (path,) = tmp_path.glob("gpu-*.json")
    run = [row["marked"] for row in json.loads(path.read_text())["tests"]]
    assert run == ["gpu and not slow", "gpu and slow"]


def test_plan_has_the_whole_grid_once_and_compiles_last():
    cases = gpu_check.plan(gpu_check.parse([]))
    assert len(cases) == len(set(cases))
    inference = [case for case in cases if case.mode == "inference"]
    assert len(inference) == 5 * 3 * 3 * 2 * 3
    assert {case.model for case in cases if case.mode == "training"} == set(gpu_check.MODELS)
    compiles = [case.execution != "eager" for case in cases]
    assert compiles == sorted(compiles)
    plan = gpu_check.plan(gpu_check.parse(["--no-compile"]))
    assert all(case.execution == "eager" for case in plan)


def test_needed_names_all_that_is_imported_at_once():
    """Packages that a file of effseg or benchmarks imports where it is loaded for the check."""
    code = """
import ast, sys, effseg, effseg.inference.predictor, benchmarks.report, benchmarks.speed
names = set()
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("effseg", "benchmarks"):
        for node in ast.parse(open(module.__file__, encoding="utf-8").read()).body:
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
print(*sorted(names - sys.stdlib_module_names - {"effseg", "benchmarks"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split())
    assert {"torch", "cv2", "rich"} <= imported
    assert imported <= set(gpu_check.NEEDED)


@pytest.mark.slow
def test_the_whole_script_on_the_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *QUICK, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    report = json.loads(path.read_text())
    assert [row.get("error") for row in report["rows"]] == [None] * 16
    assert report["about"]["command"].startswith("python -m benchmarks.gpu_check")
    assert "--quick" in report["about"]["command"]
    if not torch.cuda.is_available():
        assert "skipped" in report["tests"][0]["summary"]
