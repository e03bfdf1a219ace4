"""Weights of the classes, counted in the data; what a network may be asked for."""

# K classes

from collections.abc import Mapping
from typing import Any, Literal

import torch

from effseg.errors import InputError
from effseg.losses import SegmentationLoss


def check_channels(model_args: Mapping[str, Any]) -> None:
    """Check that the network takes RGB images, which all sources return.

    Raises:
        InputError: `in_channels` is not 3.
    """
    channels = model_args.get("in_channels", 3)
    if channels != 3:
        raise InputError(f"model_args.in_channels={channels}: images are read as RGB, expected 3")


def first_weights(given: list[float] | Literal["auto"] | None, classes: int) -> list[float] | None:
    """Return the loss's initial class weights; `auto` starts with 1 until the data are counted.

    Raises:
        InputError: the number of weights is not that of classes.
    """
    weights = [1.0] * classes if given == "auto" else given
    if weights is not None and len(weights) != classes:
        raise InputError(
            f"segmentation.class_weights: {len(weights)} values, expected one for each of "
            f"{classes} classes"
        )
    return weights


def balance_classes(task: Any) -> None:
    """Set a task's class weights from its training data, counted in one process, and print them."""
    trainer = task.trainer
    counted = trainer.datamodule.class_weights() if trainer.is_global_zero else None
    weights = trainer.strategy.broadcast(counted)
    for module in task.criterion.modules():
        if isinstance(module, SegmentationLoss):
            module.class_weights = torch.tensor(weights, device=task.device)
    named = zip(task.classes.names, weights, strict=True)
    task.print("class weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in named))
