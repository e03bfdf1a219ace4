"""`effseg fit` goes on: after signals, a damaged checkpoint, a full disk, with other settings."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import effseg.training.cli as training_cli
from effseg.cli import main
from effseg.training.progress import LineProgress
from tests.training import runs


def fit(effseg, root, run, *more):
    """Train with four batches an epoch."""
    return runs.fit(effseg, root, run, "--model.raw_scores=false", "--data.batch_size=2", *more)


def load(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def tensors(run, name="last"):
    checkpoint = load(run, name)
    actual = dict(checkpoint["state_dict"])
    for key, value in checkpoint["optimizer_states"][0]["state"].items():
        actual |= {f"{key}.{part}": tensor for part, tensor in value.items()}
    return actual


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shapes_root):
    """An unbroken run of eight steps."""
    run = tmp_path_factory.mktemp("whole") / "run"

    def effseg(*arguments):
        return main([str(argument) for argument in arguments])

    assert fit(effseg, shapes_root, run) == 0
    return run


@pytest.fixture
def at(monkeypatch):
    """Call a function once, at a hook and a step: `at("batch", 3, f)`."""
    plan = []

    def reached(hook, step):
        for entry in [e for e in plan if e[:2] == (hook, step)]:
            plan.remove(entry)
            entry[2]()

    class Watch(LineProgress):
        def on_train_batch_start(self, trainer, *args):
            reached("start", trainer.global_step)

        def on_train_batch_end(self, trainer, *args):
            reached("batch", trainer.global_step)

        def on_validation_batch_end(self, trainer, *args):
            reached("validation", trainer.global_step)

    monkeypatch.setattr(training_cli, "LineProgress", Watch)
    return lambda hook, step, function: plan.append((hook, step, function))


def send(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "hook, step, number",
    [("start", 1, 15), ("batch", 4, 2), ("validation", 4, 15), ("batch", 8, 15)],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_unbroken(
    effseg, shapes_root, tmp_path, whole, at, hook, step, number
):
    run = tmp_path / "run"
    at(hook, step, send(number))
    code, _, err = fit(effseg, shapes_root, run)
    assert code == 128 + number
    assert "Traceback" not in err
    config = (run / "config.yaml").read_bytes()
    code, out, err = fit(effseg, shapes_root, run)
    assert code == 0, err
    assert f"resumes from {run / 'checkpoints' / 'last.ckpt'}" in out
    assert_same(tensors(whole), tensors(run))
    assert_same(tensors(whole, "best"), tensors(run, "best"))
    assert (run / "config.yaml").read_bytes() == config
    assert not [*run.glob("config-*.yaml")]


def test_two_interruptions_and_a_run_that_ends_by_steps(effseg, shapes_root, tmp_path, at):
    steps = ("--trainer.max_epochs=-1", "--trainer.max_steps=7")
    assert fit(effseg, shapes_root, tmp_path / "whole", *steps)[0] == 0
    run = tmp_path / "run"
    for hook, step in (("batch", 4), ("batch", 5), ("validation", 7)):
        at(hook, step, send())
        assert fit(effseg, shapes_root, run, *steps)[0] == 143
    code, out, err = fit(effseg, shapes_root, run, *steps)
    assert code == 0 and "mIoU" in out, err
    for name in ("last", "best"):
        assert_same(tensors(tmp_path / "whole", name), tensors(run, name))
    code, _, err = fit(effseg, shapes_root, run, *steps)
    assert code == 2 and "finished" in err


def test_accumulated_gradients_are_in_no_checkpoint(effseg, shapes_root, tmp_path, at):
    accumulate = "--trainer.accumulate_grad_batches=2"
    assert fit(effseg, shapes_root, tmp_path / "whole", accumulate)[0] == 0
    run = tmp_path / "run"
    at("start", 2, send())
    assert fit(effseg, shapes_root, run, accumulate)[0] == 143
    assert load(run)["global_step"] == 3
    assert fit(effseg, shapes_root, run, accumulate)[0] == 0
    assert_same(tensors(tmp_path / "whole"), tensors(run))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_skipped(effseg, shapes_root, tmp_path, whole, at, damage):
    run = tmp_path / "run"
    at("batch", 3, send())
    assert fit(effseg, shapes_root, run, "--checkpoint_minutes=0")[0] == 143
    folder = run / "checkpoints"
    assert load(run, "previous")["global_step"] == 2
    damage(folder / "last.ckpt")
    code, out, err = fit(effseg, shapes_root, run)
    assert code == 0, err
    assert "last.ckpt: damaged, skipped" in out and "resumes from" in out
    assert_same(tensors(whole), tensors(run))


def test_without_an_intact_checkpoint_it_is_one_line(effseg, shapes_root, tmp_path, at):
    run = tmp_path / "run"
    at("batch", 1, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    cut(run / "checkpoints" / "last.ckpt")
    for more in ((), (f"--resume={run / 'checkpoints' / 'last.ckpt'}",)):
        code, _, err = fit(effseg, shapes_root, run, *more)
        assert code == 2 and err.count("\n") == 1 and "intact" in err


@pytest.mark.parametrize("freed", [False, True])
def test_a_full_disk_keeps_the_checkpoint_before(effseg, shapes_root, tmp_path, whole, at, freed):
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    at("batch", 3, limit(100_000))
    if freed:
        at("batch", 7, limit(before[0]))
    try:
        code, out, err = fit(effseg, shapes_root, run, "--checkpoint_minutes=0")
    finally:
        limit(before[0])()
    assert "last.ckpt: not written (File too large), the one before is kept" in out
    assert not [*run.rglob("*.part")]
    if not freed:
        assert code == 2 and err.count("\n") == 1 and "the one before is kept" in err
        assert load(run)["global_step"] == 2
        code, out, err = fit(effseg, shapes_root, run)
    assert code == 0, err
    assert_same(tensors(whole), tensors(run))


@pytest.mark.parametrize(
    "setting, words",
    [
        ("--data.batch_size=4", "data.batch_size: 2 → 4"),
        ("--model.optim.lr=0.5", "model.optim.lr: 0.01 → 0.5"),
        ("--seed_everything=7", "seed_everything: 0 → 7"),
    ],
)
def test_a_changed_setting_is_named_and_stops(effseg, shapes_root, tmp_path, at, setting, words):
    run = tmp_path / "run"
    at("batch", 3, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    config = (run / "config.yaml").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    code, _, err = fit(effseg, shapes_root, run, setting)
    assert code == 2 and err.count("\n") == 1 and words in err and "--resume-changed" in err
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    code, out, err = fit(effseg, shapes_root, run, setting, "--resume-changed")
    assert code == 0 and words in out, err
    assert load(run)["epoch"] == 1
    assert (run / "config.yaml").read_bytes() == config
    key, value = setting.removeprefix("--").split("=")
    changed = yaml.safe_load((run / "config-1.yaml").read_text())
    for part in key.split("."):
        changed = changed[part]
    assert str(changed) == value


def test_workers_and_a_longer_run_are_no_change(effseg, shapes_root, tmp_path, whole, at):
    run = tmp_path / "run"
    at("batch", 3, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    code, _, err = fit(effseg, shapes_root, run, "--data.num_workers=1")
    assert code == 0, err
    assert_same(tensors(whole), tensors(run))
    longer = ("--ckpt_path=last", "--trainer.max_epochs=3")
    code, out, err = fit(effseg, shapes_root, run, *longer)
    assert code == 0 and "trainer.max_epochs: 2 → 3" in out, err
    assert load(run)["global_step"] == 12


def test_never_and_a_file(effseg, shapes_root, tmp_path, whole, at):
    run = tmp_path / "run"
    at("batch", 3, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    code, _, err = fit(effseg, shapes_root, run, "--resume=never")
    assert code == 2 and err.count("\n") == 1 and "last.ckpt" in err
    other = tmp_path / "other"
    last = run / "checkpoints" / "last.ckpt"
    code, _, err = fit(effseg, shapes_root, other, f"--resume={last}")
    assert code == 0, err
    assert_same(tensors(whole), tensors(other))
    code, _, err = fit(effseg, shapes_root, other, "--resume=/no/such.ckpt")
    assert code == 2 and "/no/such.ckpt" in err


def test_settings_are_compared_with_those_of_the_last_start(effseg, shapes_root, tmp_path, at):
    run, lr = tmp_path / "run", "--model.optim.lr=0.5"
    at("batch", 3, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    at("batch", 5, send())
    assert fit(effseg, shapes_root, run, lr, "--resume-changed")[0] == 143
    code, _, err = fit(effseg, shapes_root, run)
    assert code == 2 and "model.optim.lr: 0.5 → 0.01" in err
    at("batch", 6, send())
    assert fit(effseg, shapes_root, run, lr)[0] == 143
    assert len([*run.glob("config*.yaml")]) == 2
    code, out, err = fit(effseg, shapes_root, run, "--resume-changed")
    assert code == 0 and "model.optim.lr: 0.5 → 0.01" in out, err
    assert (run / "config-2.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert load(run)["run"]["config"] == "config-2.yaml"


def test_another_optimiser_cannot_go_on(effseg, shapes_root, tmp_path, whole):
    last, run = whole / "checkpoints" / "last.ckpt", tmp_path / "run"
    more = ("--trainer.max_epochs=3", "--model.optim.name=sgd", "--resume-changed")
    code, _, err = fit(effseg, shapes_root, run, f"--resume={last}", *more)
    assert code == 2 and err.count("\n") == 1 and "model.optim.name: adamw → sgd" in err, err


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_with_all_its_epochs_is_not_resumed(effseg, shapes_root, tmp_path, whole, epochs):
    last, run = whole / "checkpoints" / "last.ckpt", tmp_path / "run"
    more = (f"--resume={last}", f"--trainer.max_epochs={epochs}")
    code, _, err = fit(effseg, shapes_root, run, *more)
    assert code == 2 and err.count("\n") == 1
    assert f"--resume {last}: has 2 epochs already, expected trainer.max_epochs above 2" in err
    assert not run.exists()


def test_the_best_score_holds_in_its_folder_and_for_its_evaluation(
    effseg, shapes_root, tmp_path, at
):
    run, other = tmp_path / "run", tmp_path / "other"
    at("batch", 5, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    last = run / "checkpoints" / "last.ckpt"
    content = load(run)
    for state in content["callbacks"].values():
        state |= {"best": 0.9} if "best" in state else {}
    torch.save(content, last)
    code, _, err = fit(effseg, shapes_root, other, f"--resume={last}")
    assert code == 0, err
    assert load(other, "best")["global_step"] == 8 and (other / "model").is_dir()

    def best():
        return {state["best"] for state in load(run)["callbacks"].values() if "best" in state}

    at("batch", 8, send())
    assert fit(effseg, shapes_root, run)[0] == 143 and best() == {0.9}
    protocol = "--model.segmentation.protocol=size64"
    assert fit(effseg, shapes_root, run, protocol, "--resume-changed")[0] == 0
    assert len(best()) == 1 and max(best()) < 0.9


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is none")
def test_usr1_saves_and_has_slurm_start_again(
    effseg, shapes_root, tmp_path, whole, at, monkeypatch
):
    run = tmp_path / "run"
    at("batch", 2, send(signal.SIGUSR1))
    at("batch", 3, lambda: load(run)["global_step"] == 2 or pytest.fail("not saved"))
    assert fit(effseg, shapes_root, run)[0] == 0, "no job: it saves and goes on"
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/called\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    again = tmp_path / "again"
    at("batch", 2, send(signal.SIGUSR1))
    assert fit(effseg, shapes_root, again)[0] == 128 + signal.SIGUSR1
    assert (tmp_path / "called").read_text() == "requeue 77\n"
    assert fit(effseg, shapes_root, again)[0] == 0
    assert_same(tensors(whole), tensors(again))


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal; from effseg.training.signals import Signals; s = Signals(); "
        "s.install(); s.deferred = True; os.kill(os.getpid(), 15); print(s.received, flush=True); "
        "os.kill(os.getpid(), 2); print('late')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "15\n")
    assert done.stderr.count("\n") == 1


def test_runs_killed_at_random_moments_survive():
    script = Path(__file__).with_name("survive.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kill=3", "--term=2", "--epochs=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rates(run, part="decoder"):
    """Return the logged learning rates by step."""
    key = f"lr-AdamW/{part}"
    return {int(row["step"]): float(row[key]) for row in runs.rows(run) if row.get(key)}


def test_changed_rates_and_decay_take_effect(effseg, shapes_root, tmp_path, at):
    changed = ("--model.optim.lr=0.001", "--model.optim.weight_decay=0.5")
    changed += ("--model.optim.encoder_lr_factor=0.1",)
    assert fit(effseg, shapes_root, tmp_path / "new", *changed)[0] == 0
    run = tmp_path / "run"
    at("batch", 3, send())
    assert fit(effseg, shapes_root, run)[0] == 143
    code, _, err = fit(effseg, shapes_root, run, *changed, "--resume-changed")
    assert code == 0, err
    for part in ("decoder", "encoder"):
        expected = rates(tmp_path / "new", part)
        assert rates(run, part) == {step: expected[step] for step in range(3, 8)}
    assert rates(run, "encoder")[3] == pytest.approx(rates(run)[3] / 10)
    groups = load(run)["optimizer_states"][0]["param_groups"]
    assert {g["name"]: g["weight_decay"] for g in groups}["decoder"] == 0.5
    assert {g["weight_decay"] for g in groups} == {0.0, 0.5}


@pytest.mark.parametrize(
    "size, setting, first",
    [(4, "", 4), (1, "", 4), (2, "--trainer.accumulate_grad_batches=2", 3)],
)
def test_the_schedule_goes_on_by_epochs_if_their_length_changes(
    effseg, shapes_root, tmp_path, at, size, setting, first
):
    """Four epochs of 4, 2 or 8 steps; the change comes after one of them, or in its middle."""
    run, more = tmp_path / "run", ["--trainer.max_epochs=4"]
    at("batch", first, send())
    assert fit(effseg, shapes_root, run, *more)[0] == 143
    more += [setting] if setting else []
    expected = runs.fit(effseg, shapes_root, tmp_path / "new", f"--data.batch_size={size}", *more)
    assert expected[0] == 0
    at("batch", first + 1, send())
    more += [f"--data.batch_size={size}", "--resume-changed"]
    assert fit(effseg, shapes_root, run, *more)[0] == 143
    before = rates(run)
    code, _, err = fit(effseg, shapes_root, run, *more)
    assert code == 0, err
    curve = rates(tmp_path / "new")
    skipped = len(curve) // 4 if size != 2 else 1
    assert [*before.values(), *rates(run).values()] == [*curve.values()][skipped:]
