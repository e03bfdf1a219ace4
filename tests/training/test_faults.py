"""What goes wrong in a run ends in one line, or ends nothing."""

import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional

import effseg as library
from effseg.data.sources.shapes import write_shapes
from effseg.losses.joint import Criterion
from effseg.training import faults, run_directory
from effseg.training.record import read_starts
from tests.training.runs import fit


def last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def bad_loss(monkeypatch):
    """Make the losses of these steps not a number."""
    steps: list[int] = []
    compare, count = Criterion.compare, iter(range(1000))

    def spoiled(self, *args, **options):
        losses = compare(self, *args, **options)
        if next(count) in steps:
            losses["loss"] = losses["loss"] * float("nan")
        return losses

    monkeypatch.setattr(Criterion, "compare", spoiled)
    return steps


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_in_no_checkpoint(
    effseg, shapes_root, tmp_path, bad_loss, step
):
    bad_loss.append(step)
    run = tmp_path / "run"
    code, _, err = fit(effseg, shapes_root, run)
    assert code == 2
    assert err.count("\n") == 1 and "not finite" in err
    assert len(re.findall(r"train_\d+", err)) == 4, "ids of the batch"
    for file in run.glob("checkpoints/*.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())
    assert (run / "checkpoints" / "last.ckpt").is_file() == (step >= 2)


def test_a_step_whose_loss_is_not_finite_is_skipped(effseg, shapes_root, tmp_path, bad_loss):
    bad_loss.append(1)
    run = tmp_path / "run"
    code, out, err = fit(effseg, shapes_root, run, "--model.nan=skip")
    assert code == 0, err
    assert out.count("skipped (1 of at most 10)") == 1
    state = last(run)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert int(state["ema.n_averaged"]) == 3


def test_a_skipped_step_leaves_weights_and_statistics_alone(
    effseg, shapes_root, tmp_path, bad_loss
):
    bad_loss.append(2)  # the first run makes one step, the second two
    states = []
    for steps in (1, 2):
        run = tmp_path / str(steps)
        length = (f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1")
        more = ("--model.nan=skip", "--model.optim.warmup_epochs=0")
        code, _, err = fit(effseg, shapes_root, run, *length, *more)
        assert code == 0, err
        states.append(last(run)["state_dict"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_learned_task_weights_survive_a_skipped_step(effseg, shapes_root, tmp_path, bad_loss):
    bad_loss.append(1)
    run = tmp_path / "run"
    learned = ("--model.nan=skip", "--model.task_weights=uncertainty")
    once = "--trainer.log_every_n_steps=100"  # losses by source are compared too
    code, out, err = fit(effseg, shapes_root, run, *learned, once, config="tiny_joint")
    assert code == 0 and "skipped (1 of at most 10)" in out, err
    for key, value in last(run)["state_dict"].items():
        assert torch.isfinite(value).all(), key


def test_too_many_skipped_steps_end_the_run(effseg, shapes_root, tmp_path, bad_loss):
    bad_loss.extend([0, 1, 2, 3])
    more = ("--model.nan=skip", "--model.nan_limit=2")
    code, _, err = fit(effseg, shapes_root, tmp_path / "run", *more)
    assert code == 2
    assert err.count("\n") == 1 and "nan_limit" in err


@pytest.fixture
def copied_shapes(tmp_path):
    write_shapes(tmp_path / "shapes", 8, 3, (64, 96), 0)
    return tmp_path / "shapes"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_any_more(effseg, copied_shapes, tmp_path, workers):
    (file,) = copied_shapes.rglob("train_00003.jpg")
    file.write_bytes(file.read_bytes()[:100])
    reading = f"--data.num_workers={workers}"
    code, _, err = fit(effseg, copied_shapes, tmp_path / "error", reading)
    assert code == 2 and "train_00003" in err and err.count("\n") == 1
    skip = (reading, "--data.unreadable=skip")
    code, out, err = fit(effseg, copied_shapes, tmp_path / "skip", *skip)
    assert code == 0, err
    assert out.count("warning: skipped") == 2 and "train_00003" in out, "once an epoch"
    code, _, err = fit(
        effseg, copied_shapes, tmp_path / "limit", *skip, "--data.unreadable_limit=1"
    )
    assert code == 2 and "unreadable_limit" in err and "train_00003" in err
    assert (tmp_path / "limit" / "config.yaml").is_file(), "it has trained"


def test_a_picture_ends_no_run(effseg, shapes_root, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("no space")

    monkeypatch.setattr(run_directory, "save_image", fails)
    run = tmp_path / "run"
    code, out, err = fit(effseg, shapes_root, run)
    assert code == 0, err
    assert "warning: pictures: OSError: no space" in out
    assert library.from_pretrained(run) is not None


def test_ids_with_folders_make_pictures(effseg, copied_shapes, tmp_path):
    for file in [*copied_shapes.rglob("val_00000.*")]:
        (file.parent / "day").mkdir()
        file.rename(file.parent / "day" / file.name)
    for file in copied_shapes.rglob("val.txt"):
        file.write_text(file.read_text().replace("val_00000", "day/val_00000"))
    run = tmp_path / "run"
    code, out, err = fit(effseg, copied_shapes, run)
    assert code == 0 and "warning" not in out, err
    assert any("day" in file.name for file in (run / "pictures").iterdir())


def test_a_logger_ends_no_run(effseg, shapes_root, tmp_path, monkeypatch):
    def fails(self, *args, **options):
        raise ConnectionError("gone")

    monkeypatch.setattr(CSVLogger, "save", fails)
    code, out, err = fit(effseg, shapes_root, tmp_path / "run")
    assert code == 0, err
    assert out.count("warning: CSVLogger: ConnectionError: gone") == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "data.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "data.crop_size"),
        (
            RuntimeError("upsample_fancy does not have a deterministic implementation, but you"),
            "upsample_fancy",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "data.num_workers",
        ),
    ],
)
def test_errors_that_a_setting_mends_are_one_line(
    effseg, shapes_root, tmp_path, monkeypatch, error, words
):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(functional, "cross_entropy", fails)
    run = tmp_path / "run"
    code, _, err = fit(effseg, shapes_root, run)
    assert code == 2
    assert err.count("\n") == 1 and words in err
    assert not run.exists(), "nothing was trained"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--trainer.max_epochs=null", "--trainer.max_time=00:00:01:00"], "max_epochs"),
        (["--trainer.max_epochs=-1"], "max_epochs"),
        (["--trainer.limit_train_batches=0"], "limit_train_batches"),
    ],
)
def test_a_run_without_an_end_or_a_batch_is_one_line(effseg, shapes_root, tmp_path, options, words):
    code, _, err = fit(effseg, shapes_root, tmp_path / "run", *options)
    assert code == 2
    assert err.count("\n") == 1 and words in err


@pytest.mark.parametrize("task", ["", "_detection", "_joint"])
def test_deterministic_algorithms_repeat_a_run(effseg, shapes_root, tmp_path, task):
    deterministic, states = "--trainer.deterministic=true", []
    for number in range(2):
        run = tmp_path / str(number)
        code, _, err = fit(effseg, shapes_root, run, deterministic, config=f"tiny{task}")
        assert code == 0, err
        states.append(last(run)["state_dict"])
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_damaged_record_stops_no_resume(effseg, shapes_root, tmp_path):
    run = tmp_path / "run"
    assert fit(effseg, shapes_root, run, "--trainer.max_steps=1")[0] == 0
    path = run / "run.json"
    path.write_text(path.read_text()[:50])
    code, out, err = fit(effseg, shapes_root, run, f"--resume={run}", "--trainer.max_steps=2")
    assert code == 0, err
    assert f"warning: {path}: JSONDecodeError" in out
    assert len(read_starts(path)) == 1
    for text in (b"", b'{"a": 1}', b"[1]", b"\xff\xfe"):
        path.write_bytes(text)
        assert read_starts(path) == []


def test_an_error_of_the_users_code_keeps_its_traceback(tmp_path):
    file = tmp_path / "lightning" / "mine.py"  # a folder of this name is not the library
    code = compile("raise RuntimeError('mine')", str(file), "exec")
    for names in ({"__name__": "mine"}, {"__builtins__": {"RuntimeError": RuntimeError}}):
        with pytest.raises(RuntimeError) as caught:
            exec(code, names)
        assert faults.explained(caught.value) is None
