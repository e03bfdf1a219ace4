"""`effseg fit --plan`, and what `validate` takes beside a checkpoint."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effseg.training import plan
from effseg.training.optim import OptimConfig

CONF = Path(__file__).parents[1] / "conf"


@pytest.mark.parametrize("recipe", ["tiny", "tiny_joint"])
def test_a_plan_counts_and_trains_nothing(effseg, recipe, shapes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = CONF / f"{recipe}.yaml"
    code, out, err = effseg("fit", f"--config={config}", "--plan", f"--data.root={shapes_root}")
    assert code == 0, err
    assert re.search(r"a step: [\d.]+ s on cpu, peak memory [\d,]+ MiB; about [\d.]+ min", out)
    assert re.search(r"schedule: \d+ crops a step, \d+ steps an epoch, \d+ epochs, \d+ steps", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, words",
    [
        (["--trainer.max_steps=3"], "4 crops a step, 2 steps an epoch, 2 epochs, 3 steps"),
        (["--trainer.max_epochs=null", "--trainer.max_steps=7"], "2 steps an epoch, 7 steps"),
        (["--trainer.limit_train_batches=0.5"], "4 crops a step, 1 steps an epoch, 2 epochs, 2 s"),
        (["--trainer.accumulate_grad_batches=2"], "8 crops a step, 1 steps an epoch, 2 epochs, 2 "),
        (
            ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"],
            "4 crops a step, 2 steps an epoch, 2 epochs, 4 steps",
        ),
    ],
)
def test_a_plan_counts_the_steps_that_are_trained(effseg, shapes_root, options, words):
    config = f"--config={CONF / 'tiny.yaml'}"
    code, out, err = effseg("fit", config, "--plan", f"--data.root={shapes_root}", *options)
    assert code == 0, err
    assert words in out, out


@pytest.mark.parametrize(("name", "copies"), [("sgd", 1), ("adamw", 2)])
def test_the_memory_on_cuda_counts_the_optimisers_state(monkeypatch, name, copies):
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 1000)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    model = nn.Linear(10, 10)
    model.bias.requires_grad_(False)
    task = SimpleNamespace(
        optim=OptimConfig(name), parameters=model.parameters, zero_grad=model.zero_grad
    )
    task.to = lambda device: model
    task.transfer_batch_to_device = lambda batch, device, number: batch
    task.prepare = lambda batch: (batch, [])
    task.criterion = lambda images, batch, tasks: {"loss": model(images).sum()}
    _, memory = plan._time_batches(task, [torch.ones(1, 10)], torch.device("cuda"))
    assert memory == 1000 + copies * 400


@pytest.mark.parametrize("name", ["", "model"])
def test_a_run_or_its_saved_model_scores_as_its_best_checkpoint(
    effseg, finished_run, shapes_root, name
):
    def score(path):
        config = f"--config={finished_run / 'config.yaml'}"
        code, out, err = effseg("validate", config, f"--ckpt_path={path}")
        assert code == 0, err
        return re.search(r"^mIoU [\d.]+", out, re.MULTILINE)[0]

    assert score(finished_run / name) == score(finished_run / "checkpoints" / "best.ckpt")


def test_a_folder_without_a_model_is_one_line(effseg, finished_run, tmp_path):
    config = f"--config={finished_run / 'config.yaml'}"
    code, _, err = effseg("validate", config, f"--ckpt_path={tmp_path}")
    assert code == 2
    assert str(tmp_path) in err and len(err.strip().splitlines()) == 1
