"""Freeze an encoder by level, and remove stages that no map depends on."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from effseg.errors import InputError


class FreezableEncoder(nn.Module):
    """A network whose encoder may be frozen, in part or completely."""

    encoder: Any
    mean: torch.Tensor
    frozen_levels = 0
    """Level up to which the encoder is frozen; its depth if all of it is."""
    _frozen_paths: Sequence[str] = ()

    def freeze_encoder(self, levels: int | None = None) -> None:
        """Freeze the encoder: no gradients, and BatchNorm statistics are kept.

        Args:
            levels: freeze only the layers that the maps up to this level (stride 2^levels) depend
                on; the finest maps cost most of a training step. None: all layers; 0: none.

        Raises:
            InputError: a level that the encoder does not have.
        """
        depth = len(self.encoder.out_channels) - 1
        if levels is not None and not 0 <= levels <= depth:
            raise InputError(f"freeze_encoder: level {levels}, expected 0 to {depth}")
        self.frozen_levels = depth if levels is None else levels
        self.encoder.requires_grad_(True)
        frozen = {name for name, _ in self.encoder.named_parameters()}
        if self.frozen_levels < depth:
            # Not the last of them alone: the branches of an HRNet end in a map each.
            levels_read = range(1, self.frozen_levels + 1)
            frozen = parameters_behind(self.encoder, levels_read, self.mean.shape[0])
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(name not in frozen)
        # Whole blocks, not only BatchNorms: a block may have stochastic depth.
        self._frozen_paths = modules_of(self.encoder, frozen)
        self.train(self.training)

    def unfreeze_encoder(self) -> None:
        """Undo `freeze_encoder`, as smp names it."""
        self.freeze_encoder(0)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen layers of the encoder stay in evaluation mode."""
        super().train(mode)
        for path in self._frozen_paths:
            self.encoder.get_submodule(path).eval()
        return self


def parameters_behind(encoder: nn.Module, levels: Collection[int], in_channels: int) -> set[str]:
    """Return the names of the encoder's parameters that the maps of `levels` depend on."""
    if not levels:
        return set()
    parameters = dict(encoder.named_parameters())
    image = torch.zeros(1, in_channels, 64, 64).to(next(iter(parameters.values())))
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()  # so that statistics are not updated
    with torch.enable_grad():
        maps = encoder(image)
        total = torch.stack([maps[level].sum() for level in levels]).sum()
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        gradients: Sequence[torch.Tensor | None] = [None] * len(trained)
        # smp gives a transformer's finer levels empty maps, which depend on nothing.
        if total.requires_grad:
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for module, mode in modes.items():
        module.training = mode
    return {n for n, gradient in zip(trained, gradients, strict=True) if gradient is not None}


def modules_of(module: nn.Module, names: Collection[str]) -> list[str]:
    """Return the paths of the outermost modules whose parameters are all among `names`."""
    chosen: list[str] = []
    for path, child in module.named_modules():
        if any(path.startswith(f"{outer}.") for outer in chosen):
            continue
        inside = [f"{path}.{name}" for name, _ in child.named_parameters()]
        if path and inside and all(name in names for name in inside):
            chosen.append(path)
    return chosen


def cut_unread(encoder: nn.Module, in_channels: int) -> None:
    """Remove the stages after the last map, which timm builds and runs at every depth.

    Their parameters would get no gradient, which makes DistributedDataParallel fail.

    Raises:
        InputError: the encoder cannot run without them (HRNet's branches).
    """
    last = len(encoder.out_channels) - 1  # type: ignore[arg-type]
    behind = parameters_behind(encoder, range(1, last + 1), in_channels)
    unread = {name for name, _ in encoder.named_parameters()} - behind
    paths = modules_of(encoder, unread)
    for path in paths:
        encoder.set_submodule(path, nn.Identity())
    try:
        parameters_behind(encoder, range(1, last + 1), in_channels)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"encoder_depth={last}: this encoder cannot run without its later stages ({paths[0]} "
            "…), expected encoder_depth=5"
        ) from error
    encoder.register_load_state_dict_pre_hook(partial(_drop, tuple(f"{p}." for p in paths)))


def _drop(
    paths: tuple[str, ...], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Drop the tensors of removed stages, which older files contain; a hook of torch."""
    for key in [k for k in state if k.startswith(tuple(prefix + path for path in paths))]:
        del state[key]
