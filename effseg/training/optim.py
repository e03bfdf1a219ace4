"""Optimiser and learning-rate schedule of every task."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from effseg.errors import InputError
from effseg.training.position import Position


@dataclass(frozen=True)
class OptimConfig:
    """How a model is optimised; the defaults are the paper's (appendix), for a batch of 16.

    Attributes:
        name: `sgd` (momentum 0.9, no Nesterov: the reference is unstable with it) or `adamw`.
        lr: peak rate of decoder and heads, for the whole batch over all processes. The paper's
            rule is 0.08 per batch of 64.
        encoder_lr_factor: the encoder's rate as a share of `lr`.
        weight_decay: of the kernels of convolutions and linear layers only.
        schedule: `cosine` or `poly` (power 0.9), down to 0.
        warmup_epochs: epochs of linear warm-up from lr / 1000; a fraction is fine.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    encoder_lr_factor: float = 1.0
    weight_decay: float = 4e-5
    schedule: Literal["cosine", "poly"] = "cosine"
    warmup_epochs: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("lr", "encoder_lr_factor", "weight_decay", "warmup_epochs"):
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0 or (key == "lr" and value == 0):
                raise InputError(f"optim.{key}={value}: expected a finite number, not negative")


def param_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters by rate (encoder or not) and decay (kernels or not).

    BatchNorm, biases and fusion weights are not decayed (google/automl `train_lib.py` decays
    kernels only). Frozen parameters are left out; an empty group is not made.
    """
    encoder = getattr(model, "encoder", None)  # by identity: another network's may be a property
    in_encoder = {id(p) for p in encoder.parameters()} if isinstance(encoder, nn.Module) else set()
    # _ConvNd is private: a public base of all convolutions would replace it.
    kernels = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in in_encoder, id(parameter) in kernels)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * (config.encoder_lr_factor if encoder_part else 1.0),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "name": f"{'encoder' if encoder_part else 'decoder'}{'' if decayed else '_no_decay'}",
        }
        for (encoder_part, decayed), parameters in groups.items()
    ]


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimiser over `param_groups`."""
    if config.name == "sgd":
        return torch.optim.SGD(list(groups), lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(list(groups), lr=config.lr)


def length_and_offset(trainer: Any, batches: float, resumed: Position | None) -> tuple[int, int]:
    """Return the steps of a run's schedule, and what to add to the steps done for the place in it.

    That is not 0 if a resumed run has epochs of another length: its place then follows from the
    epochs done, so that the schedule goes on from there and ends with the last epoch. If max_steps
    ends the run, the length of an epoch has no effect on the schedule.
    """
    if not batches or math.isinf(batches):  # infinite if `limit_train_batches` is 0
        raise InputError("trainer.limit_train_batches: leaves no batch, expected at least one")
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        raise InputError(
            "the schedule needs an end: expected trainer.max_epochs or trainer.max_steps, to which "
            "trainer.max_time may be added"
        )
    if resumed is None or trainer.max_epochs < 0:
        return int(total), 0
    accumulate = trainer.accumulate_grad_batches
    offset = resumed.steps_done(int(batches), accumulate) - resumed.step
    by_epochs = trainer.max_epochs * math.ceil(batches / accumulate)
    if 0 <= trainer.max_steps <= by_epochs - offset:
        return trainer.max_steps, 0
    return by_epochs, offset


def lr_factor(
    config: OptimConfig, total_steps: int, steps_per_epoch: float, offset: int = 0
) -> Callable[[int], float]:
    """Return the factor on every group's rate as a function of the step.

    Warm-up is linear, over a quarter of the run at most, so that short runs still reach their rate.
    Afterwards the curve runs over the remaining steps: it starts at 1 and ends at 0. For `offset`
    see `length_and_offset`.
    """
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total_steps // 4)

    def factor(step: int) -> float:
        step += offset
        if step < warmup:
            return max(1e-3, step / warmup)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule == "poly":
            return float((1.0 - progress) ** 0.9)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


class Rates:
    """The rates and decays that an optimiser was built with.

    Lightning restores those of the checkpoint, which would undo changed settings.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        keys = ("initial_lr", "weight_decay")
        self.groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]

    def restore(self) -> None:
        """Set them again, each rate for the current step."""
        schedule, groups = self.schedule, self.optimizer.param_groups
        schedule.base_lrs = [own["initial_lr"] for own in self.groups]
        for own, group, factor in zip(self.groups, groups, schedule.lr_lambdas, strict=True):
            group |= own | {"lr": own["initial_lr"] * factor(schedule.last_epoch)}
