"""Models without names, or with the classes in another order, and runs that start together."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import effseg as library
from effseg.training import run_directory

TINY = Path(__file__).parents[1] / "conf" / "tiny.yaml"
UNNAMED = "its classes have no names, taken for the data's in their order"


@pytest.fixture
def command(shapes_root):
    return (f"--config={TINY}", f"--data.root={shapes_root}", "--model.raw_scores=false")


@pytest.fixture(scope="module")
def models(finished_run, tmp_path_factory):
    """The model of a run without its names, with two classes swapped, and of fewer classes."""
    root = tmp_path_factory.mktemp("models")
    for name in ("unnamed", "swapped"):
        model = library.from_pretrained(finished_run)
        names = model.config.pop("_class_names")
        if name == "swapped":
            names[1], names[2] = names[2], names[1]
            model.config["_class_names"] = names
        model.save_pretrained(root / name)
    torch.save(model.state_dict(), root / "unnamed.pth")
    fewer = library.create_model("effseg_lite0", encoder_name="tu-test_efficientnet", classes=3)
    fewer.save_pretrained(root / "fewer")
    return root


def test_evaluation_of_a_saved_model(effseg, command, models):
    code, _, err = effseg("validate", *command, f"--ckpt_path={models / 'unnamed'}")
    assert code == 0 and err.count(UNNAMED) == 1
    code, _, err = effseg("validate", *command, f"--ckpt_path={models / 'swapped'}")
    assert code == 2 and err.count("\n") == 1
    assert "not those of the data (class 1 is 'square' and 'circle')" in err
    code, _, err = effseg("validate", *command, f"--ckpt_path={models / 'fewer'}")
    assert code == 2 and "fewer: 3 classes, expected 7 as the data" in err


@pytest.mark.parametrize("name", ["unnamed", "unnamed.pth"])
def test_start_from_a_model_without_names(effseg, command, models, name):
    code, _, err = effseg("validate", *command, f"--model.init_from={models / name}")
    assert code == 0 and err.count(f"{name}: {UNNAMED}") == 1


def test_start_from_a_model_with_another_order(effseg, command, models):
    code, out, err = effseg("validate", *command, f"--model.init_from={models / 'swapped'}")
    assert code == 0 and UNNAMED not in err
    fresh = next(line for line in out.splitlines() if line.startswith("init_from="))
    assert "tensors start fresh: segmentation_head.classifier." in fresh


def test_runs_that_start_in_one_second(effseg, command, tmp_path, monkeypatch):
    clock = SimpleNamespace(strftime=lambda _: "20260102-030405", monotonic=time.monotonic)
    monkeypatch.setattr(run_directory, "time", clock)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert effseg("fit", *command, "--trainer.max_steps=1")[0] == 0
    runs = sorted(path.name for path in Path("runs").iterdir())
    assert runs == ["20260102-030405", "20260102-030405-1", "20260102-030405-2"]
    for run in runs:
        assert (Path("runs") / run / "model" / "model.safetensors").is_file()
        assert (Path("runs") / run / "config.yaml").is_file()
