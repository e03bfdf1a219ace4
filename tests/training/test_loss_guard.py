"""What a loss that is not finite needs of the device, and of the other processes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effseg import InputError
from effseg.training import faults
from effseg.training.faults import LossGuard


class OnCUDA:
    """Whether a loss is finite, on a GPU: reading it there is an error."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, value, events):
        self.value, self.events = value, events

    def to(self, device, non_blocking):
        assert device == "cpu" and non_blocking
        self.events.append("copy")
        return torch.tensor(self.value)

    def __bool__(self):
        raise AssertionError("waits for all that is queued")


def test_on_cuda_the_loss_of_the_step_before_is_read_without_waiting_for_this_one(monkeypatch):
    events, finite = [], iter([True, False, True])
    event = SimpleNamespace(synchronize=lambda: events.append("wait"))
    record = SimpleNamespace(record_event=lambda: events.append("record") or event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: record)
    monkeypatch.setattr(faults.torch, "isfinite", lambda _: OnCUDA(next(finite), events))
    guard = LossGuard("error", 0)
    guard.see(torch.zeros(()), 0, ["a"])
    guard.see(torch.zeros(()), 1, ["b"])
    assert events == ["copy", "record", "wait", "copy", "record"]
    with pytest.raises(InputError, match="step 1, with the images b"):
        guard.see(torch.zeros(()), 2, ["c"])


def skip_in_one_of_two(rank, losses, others, monkeypatch, capsys):
    """Return what a process prints that skips a step, given the faults of the other one."""
    monkeypatch.setattr(faults, "of_all_processes", lambda rows: [*rows, *others])
    monkeypatch.setattr(faults, "rank_and_world", lambda: (rank, 2))
    guard, model = LossGuard("skip", 5), nn.Linear(1, 1)
    guard.start(model)
    for number, loss in enumerate(losses):  # batches of one step
        guard.see(torch.tensor(loss), 3, [f"image{number}"])
    guard.skip(model, torch.optim.SGD(model.parameters(), 0.1))
    return capsys.readouterr().out


def test_a_skipped_step_names_the_images_whose_loss_was_bad(monkeypatch, capsys):
    nan = float("nan")
    said = skip_in_one_of_two(0, [nan, 1.0], [], monkeypatch, capsys)
    assert "images image0: skipped" in said
    said = skip_in_one_of_two(0, [1.0], ["the other's"], monkeypatch, capsys)
    assert said == "warning: the other's: skipped (1 of at most 5)\n"
    assert skip_in_one_of_two(1, [nan], [], monkeypatch, capsys) == "", "the first one says it"
