"""Exponential moving average of a model's weights."""

import copy
from typing import Any

import torch
from torch import nn


def ema_decay(decay: float, updates: int) -> float:
    """Return min(decay, (1 + n) / (10 + n)) after n updates.

    With a constant 0.9998 the average takes some 5,000 steps to forget the initial weights
    (google/automl and TensorFlow's `num_updates` warm it up the same way).
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))


class ModelEMA(nn.Module):
    """Average of weights and BatchNorm statistics, as TensorFlow's; starts as a copy of the model.

    At most `decay`, in (0, 1), of the average is kept per step. Its tensors are part of the task's
    checkpoint. torch's `AveragedModel` has the same ones, but reads the number of updates from the
    device three times a step, and each read waits for all the work that the device still has to do.
    """

    n_averaged: torch.Tensor
    """Number of updates, for checkpoints."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module: Any = copy.deepcopy(model)
        self.register_buffer("n_averaged", torch.tensor(0))
        self._updates: int | None = None  # the same number; None: to be read
        self.register_load_state_dict_post_hook(_read_again)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ModelEMA":
        """Stay in evaluation mode whatever the parent's mode: the average is never trained."""
        return super().train(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; the first update takes them as they are."""
        if self._updates is None:
            self._updates = int(self.n_averaged)
        weight = 1.0 - ema_decay(self.decay, self._updates) if self._updates else 1.0
        averages = [*self.module.parameters(), *self.module.buffers()]
        pairs = list(zip(averages, [*model.parameters(), *model.buffers()], strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]  # BatchNorm's
        # One call for all tensors; a public name for torch's `_foreach` functions would replace it.
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], weight)
        if counters:
            torch._foreach_copy_([a for a, _ in counters], [b for _, b in counters])
        self._updates += 1
        self.n_averaged += 1


def _read_again(module: Any, _: Any) -> None:
    module._updates = None
