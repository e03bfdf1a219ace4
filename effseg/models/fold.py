"""Prepare a model for inference: fold BatchNorms, make fusion weights constant, channels_last."""

# B batch, C channels, H W pixels.

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effseg.errors import InputError
from effseg.models.bifpn import Fuse
from effseg.models.heads import LevelHead
from effseg.models.layers import SeparableConv2d

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model, compile: bool = False) -> Model:
    """Return a faster copy of a model with the same outputs, for inference only.

    BatchNorms are folded into the preceding convolutions, BiFPN's fusion weights become constants,
    and the layout is channels_last. Folding happens in float32, whatever the model's dtype, and is
    verified on a random image.

    Args:
        model: an EffSeg, EfficientDet or EffSegDet, or another convolutional module with an
            `encoder` as in smp; not modified.
        compile: also `torch.compile` the copy: the first call with each input size takes about a
            minute.

    Raises:
        InputError: outputs differ by more than 1e-4 of the largest (1e-2 on a GPU, where
            convolutions may use TF32).
    """
    weight = next(p for p in model.parameters() if p.is_floating_point())
    full = copy.deepcopy(model).float().eval().requires_grad_(False)
    channels = int(getattr(getattr(model, "encoder", None), "_in_channels", 3))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, 128, 128, generator=generator).to(weight.device)
    with torch.no_grad():
        expected = full(image)
        for name, module in list(full.named_modules()):
            if isinstance(module, LevelHead) and isinstance(module.convs[0], SeparableConv2d):
                _fold_level_head(module)
            elif isinstance(module, Fuse):
                full.set_submodule(name, ConstantFuse(module))
        _fold_batchnorms(full, image)
        full = full.to(memory_format=torch.channels_last)
        for a, b in zip(_tensors(expected), _tensors(full(image)), strict=True):
            tolerance = 1e-4 if a.device.type == "cpu" else 1e-2
            error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
            if not error <= tolerance:
                raise InputError(
                    f"{type(model).__name__}: outputs differ by {error:.1e} of the largest after "
                    f"folding, expected at most {tolerance:g}; the model cannot be optimised"
                )
    fast = full.to(weight.dtype)
    fast.folded = True  # type: ignore[assignment]
    if compile:
        fast.compile()
    return fast


class ConstantFuse(nn.Module):
    """A fusion with constant weights that sums in place."""

    weights: torch.Tensor

    def __init__(self, fuse: Fuse) -> None:
        """Copy the normalised weights of a fusion."""
        super().__init__()
        weights = torch.ones(fuse.inputs) if fuse.weight is None else fuse.normalised()
        self.constants = weights.tolist() if weights.ndim == 1 else None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse N maps (B, C, H, W) into one."""
        if self.constants is None:
            total = maps[0] * self.weights[0]
            for x, weight in zip(maps[1:], self.weights[1:], strict=True):
                total = total.addcmul_(x, weight)
            return total
        first, second, *rest = self.constants
        total = maps[0] if first == 1.0 else maps[0] * first
        total = torch.add(total, maps[1], alpha=second)
        for x, constant in zip(maps[2:], rest, strict=True):
            total = total.add_(x, alpha=constant)
        return total


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a copy of a convolution with the following BatchNorm folded in."""
    assert norm.running_mean is not None and norm.running_var is not None
    result = copy.deepcopy(conv)
    result.weight, result.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return result.requires_grad_(False)


def _fold_level_head(head: LevelHead) -> None:
    """Fold each level's BatchNorms into pointwise convolutions; the depthwise ones stay shared."""
    convs: Any = head.convs
    norms: Any = head.norms
    for i, conv in enumerate(convs):
        norms[i] = nn.ModuleList(folded(conv.pointwise, norm) for norm in norms[i])
        convs[i] = conv.depthwise


def _fold_batchnorms(model: nn.Module, image: torch.Tensor) -> None:
    """Fold each BatchNorm that is applied once, to a convolution that runs once, by tracing."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[torch.Tensor, nn.Conv2d]] = {}  # held, so that no id is reused
    runs: dict[nn.Module, int] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after_conv(module: Any, inputs: Any, output: torch.Tensor) -> None:
        runs[module] = runs.get(module, 0) + 1
        outputs[id(output)] = (output, module)

    def before_norm(module: Any, inputs: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        if id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][1]

    hooks: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    model(image)
    for hook in hooks:
        hook.remove()
    for norm, conv in pairs.items():
        if runs[norm] == runs[conv] == 1 and norm.running_mean is not None:
            merged = folded(conv, norm)
            conv.weight, conv.bias = merged.weight, merged.bias
            # timm's BatchNorm-with-activation leaves its activation.
            activation = getattr(norm, "act", None)
            remaining = activation if isinstance(activation, nn.Module) else nn.Identity()
            model.set_submodule(names[norm], remaining)


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output if part is not None for t in _tensors(part)]
