"""The line that an epoch prints."""

from types import SimpleNamespace

import pytest
import torch

from effseg.training.progress import LineProgress, TerminalProgress


def line(capsys, monkeypatch, **limits):
    """Return the line after the second of the epochs, of 50 steps and 60 seconds each."""
    clock = iter((0.0, 120.0))
    monkeypatch.setattr("effseg.training.progress.time.monotonic", lambda: next(clock))
    progress, task = LineProgress(), SimpleNamespace(scored_step=None)
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=0, global_step=0, **limits)
    trainer.callback_metrics = {"train/loss": torch.tensor(0.5), "val/miou": torch.tensor(0.9)}
    progress.on_train_start(trainer, task)
    trainer.current_epoch, trainer.global_step = 1, 100
    progress.on_train_epoch_end(trainer, task)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "start", "end"),
    [
        (10, -1, "epoch 2/10  step 100  train/loss", "120 s  about 8.0 min left\n"),
        (-1, 400, "epoch 2  step 100/400  train/loss", "120 s  about 6.0 min left\n"),
        (10, 400, "epoch 2/10  step 100/400  train/loss", "120 s  about 6.0 min left\n"),
        (None, -1, "epoch 2  step 100  train/loss", "120 s\n"),
    ],
)
def test_limits_and_the_time_that_is_left(capsys, monkeypatch, max_epochs, max_steps, start, end):
    text = line(capsys, monkeypatch, max_epochs=max_epochs, max_steps=max_steps)
    assert text.startswith(start) and text.endswith(end)
    assert "val/miou" not in text  # of an earlier epoch


def test_a_terminal_reads_the_loss_once_in_log_every_n_steps():
    read = []

    class Training(SimpleNamespace):
        @property
        def progress_bar_metrics(self):
            read.append(self.global_step)
            return {"train/loss": torch.tensor(float(self.global_step))}

    trainer = Training(training=True, is_last_batch=False, loggers=[], log_every_n_steps=10)
    progress, shown = TerminalProgress(), []
    for step in range(1, 33):  # steps done
        trainer.global_step, trainer.is_last_batch = step, step == 32
        shown.append(progress.get_metrics(trainer, None)["train/loss"])
    assert read == [1, 10, 20, 30, 32]
    assert shown[8:10] == [1.0, 10.0] and shown[-1] == 32.0
