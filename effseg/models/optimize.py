"""A trained model made ready to run: BatchNorms folded, fusion weights constant, channels last."""

# B batch, C channels, H W pixels.

import copy
from typing import Any, TypeVar

import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from effseg.models.bifpn import Fuse
from effseg.models.compiled import compare, compile_frozen
from effseg.models.heads import LevelHead
from effseg.models.inference_layers import (
    ConstantFuse,
    EvenConv2dSame,
    FoldedLevelHead,
    VectorSqueezeExcite,
    fold_norm,
)

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(model: Model, compile: bool = False) -> Model:
    """Return a copy of a model that gives the same outputs sooner; it cannot be trained.

    BatchNorms are folded into the convolutions before them, in the encoder too; BiFPN's fusion
    weights become numbers; squeeze-and-excitation becomes products of a vector; no padded copies
    are made; the layout is channels_last. The copy's outputs are compared with the model's on a
    random photo.

    Args:
        model: an EffSeg, an EfficientDet, an EffSegDet, or another module of convolutions with an
            ``encoder`` as smp's; it is left as it is.
        compile: also ``torch.compile`` it, see :func:`effseg.models.compiled.compile_frozen`.

    Raises:
        InputError: outputs that differ by more than 1e-4 of the largest (2e-2 in low precision).
    """
    original = model if not model.training else copy.deepcopy(model).eval()
    fast = copy.deepcopy(original).requires_grad_(False)
    photo = _photo(fast)
    _fold_heads(fast)
    _fold_fusions(fast)
    _fold_batchnorms(fast, photo)
    for name, module in list(fast.named_modules()):
        if EvenConv2dSame.suits(module):
            _replace(fast, name, EvenConv2dSame(module))  # type: ignore[arg-type]
        elif type(module) is SqueezeExcite:
            _replace(fast, name, VectorSqueezeExcite(module))
    fast = fast.to(memory_format=torch.channels_last)
    with torch.no_grad():
        compare(original, original(photo), fast(photo), "folding")
    if compile:
        compile_frozen(fast)
    return fast


def _photo(model: nn.Module) -> torch.Tensor:
    """Return a random photo (1, C, 128, 128) that fits the model's device and dtype."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    channels = int(getattr(getattr(model, "encoder", None), "_in_channels", 3))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, 128, 128, generator=generator).to(weight)


def _fold_heads(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, LevelHead):
            _replace(model, name, FoldedLevelHead(module))


def _fold_fusions(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, Fuse):
            _replace(model, name, ConstantFuse(module, module.inputs))


def _fold_batchnorms(model: nn.Module, photo: torch.Tensor) -> None:
    """Fold every BatchNorm that alone reads a convolution's output, found by running the model."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[torch.Tensor, nn.Conv2d]] = {}  # the tensors keep their ids
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
    with torch.no_grad():
        model(photo)
    for hook in hooks:
        hook.remove()
    for norm, conv in pairs.items():
        if runs[norm] == runs[conv] == 1 and norm.running_mean is not None:
            folded = fold_norm(conv, norm)
            conv.weight, conv.bias = folded.weight, folded.bias
            _replace(model, names[norm], _what_follows(norm))


def _what_follows(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what is left of a folded BatchNorm: in timm's BatchNormAct2d the activation."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
