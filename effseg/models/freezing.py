"""Which of an encoder's parameters its maps depend on: what to freeze, and what nobody needs."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn


def parameters_behind(encoder: nn.Module, levels: Collection[int], in_channels: int) -> set[str]:
    """Return the names of the encoder's parameters that its maps of some levels depend on."""
    parameters = dict(encoder.named_parameters())
    image = torch.zeros(1, in_channels, 64, 64).to(next(iter(parameters.values())))
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()  # one image, and no statistics of it
    with torch.enable_grad():
        maps = encoder(image)
        total = torch.stack([maps[level].sum() for level in levels]).sum()
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for module, mode in modes.items():
        module.training = mode
    return {n for n, gradient in zip(trained, gradients, strict=True) if gradient is not None}


def modules_of(module: nn.Module, names: Collection[str]) -> list[str]:
    """Return the paths of the outermost modules all of whose parameters are among ``names``."""
    chosen: list[str] = []
    for path, child in module.named_modules():
        if any(path.startswith(f"{outer}.") for outer in chosen):
            continue
        inside = [f"{path}.{name}" for name, _ in child.named_parameters()]
        if path and inside and all(name in names for name in inside):
            chosen.append(path)
    return chosen


def cut_unread(encoder: nn.Module, in_channels: int) -> None:
    """Drop the stages beyond the last map, which timm builds and runs at every depth.

    They would have no gradient, which stops DistributedDataParallel.
    """
    last = len(encoder.out_channels) - 1  # type: ignore[arg-type]
    behind = parameters_behind(encoder, range(1, last + 1), in_channels)
    unread = {name for name, _ in encoder.named_parameters()} - behind
    paths = modules_of(encoder, unread)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(encoder.get_submodule(parent), name, nn.Identity())
    encoder.register_load_state_dict_pre_hook(partial(_drop, tuple(f"{p}." for p in paths)))


def _drop(
    paths: tuple[str, ...], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Forget the tensors of cut stages in a file of before they were cut."""
    for key in [k for k in state if k.startswith(tuple(prefix + path for path in paths))]:
        del state[key]
