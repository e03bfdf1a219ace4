"""Exponential moving average of a model's weights."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def ema_decay(decay: float, updates: int) -> float:
    """Return min(decay, (1 + n) / (10 + n)) after n updates.

    With a constant 0.9998 the average takes some 5,000 steps to forget the initial weights
    (google/automl and TensorFlow's `num_updates` warm it up the same way).
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))


class ModelEMA(AveragedModel):
    """Average of weights and BatchNorm statistics, as TensorFlow's; starts as a copy of the model.

    Its tensors are part of the task's checkpoint.

    Args:
        model: the model that is trained.
        decay: 0 < decay < 1, the largest share of the average kept per step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ModelEMA":
        """Stay in evaluation mode whatever the parent's mode: the average is never trained."""
        return super().train(False)

    def _average(self, averaged: Any, current: Any, updates: torch.Tensor | int) -> None:
        if averaged[0].is_floating_point():
            decay = ema_decay(self.decay, int(updates))
            torch._foreach_lerp_(averaged, current, 1.0 - decay)
        else:  # BatchNorm's counters
            torch._foreach_copy_(averaged, current)
