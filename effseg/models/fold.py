"""Prepare a model for inference: fold BatchNorms, make fusion weights constant, channels_last."""

# B batch, C channels, H W pixels.

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
        compile: also `torch.compile` the copy: the first call takes about a minute, the first with
            another size longer, since it makes a graph for many sizes.

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
        for module in list(full.modules()):
            if isinstance(module, LevelHead) and isinstance(module.convs[0], SeparableConv2d):
                _fold_level_head(module)
            elif isinstance(module, Fuse) and module.weight is not None:
                module.weight, module.kind = nn.Parameter(module.normalised(), False), "unbounded"
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


def _fold_level_head(head: LevelHead) -> None:
    """Fold each level's BatchNorms into pointwise convolutions; the depthwise ones stay shared."""
    convs: Any = head.convs
    norms: Any = head.norms
    for i, conv in enumerate(convs):
        norms[i] = nn.ModuleList(fuse_conv_bn_eval(conv.pointwise, norm) for norm in norms[i])
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
            merged = fuse_conv_bn_eval(conv, norm)
            conv.weight, conv.bias = merged.weight, merged.bias
            # timm's BatchNorm-with-activation leaves its activation.
            activation = getattr(norm, "act", None)
            remaining = activation if isinstance(activation, nn.Module) else nn.Identity()
            model.set_submodule(names[norm], remaining)


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output if part is not None for t in _tensors(part)]
