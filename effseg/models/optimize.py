"""A trained model made ready to run: BatchNorms folded, fusion weights constant, channels last."""

# B batch, C channels, H W pixels.

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effseg.models.bifpn import Fuse
from effseg.models.compiled import compare, compile_frozen
from effseg.models.heads import LevelHead

Model = TypeVar("Model", bound=nn.Module)


class ConstantFuse(nn.Module):
    """A fusion whose weights are numbers, summed in place."""

    weights: torch.Tensor

    def __init__(self, fuse: Fuse, inputs: int) -> None:
        """Take the normalised weights of a fusion of ``inputs`` maps."""
        super().__init__()
        weights = torch.ones(inputs) if fuse.weight is None else fuse.normalised().detach()
        self.constants = weights.tolist() if weights.ndim == 1 else None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse N maps (B, C, H, W) into one."""
        # Folding numbers into convolutions, inductor (torch 2.14, binary_folding.py) stores all of
        # them under one name: each convolution would get the last number. Tensors it keeps apart.
        if self.constants is None or torch.compiler.is_compiling():
            weights = self.weights.to(maps[0].dtype).unbind(0)
            total = maps[0] * weights[0]
            for x, weight in zip(maps[1:], weights[1:], strict=True):
                total.addcmul_(x, weight)
            return total
        first, second, *rest = self.constants
        if first == 1.0:
            total = torch.add(maps[0], maps[1], alpha=second)
        else:
            total = (maps[0] * first).add_(maps[1], alpha=second)
        for x, constant in zip(maps[2:], rest, strict=True):
            total.add_(x, alpha=constant)
        return total


class FoldedLevelHead(nn.Module):
    """A level head whose BatchNorms are folded: a pointwise convolution for each level."""

    def __init__(self, head: LevelHead) -> None:
        """Fold the head."""
        super().__init__()
        convs: list[Any] = list(head.convs)
        norms: list[Any] = list(head.norms)
        self.depthwise = nn.ModuleList(conv.depthwise for conv in convs)
        self.pointwise = nn.ModuleList(
            nn.ModuleList(_folded(conv.pointwise, norm) for norm in levels)
            for conv, levels in zip(convs, norms, strict=True)
        )
        self.activation, self.predict = head.activation, head.predict

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map each level (B, C, H, W) to (B, outputs, H, W)."""
        found: list[torch.Tensor] = []
        for level, x in enumerate(maps):
            for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
                x = self.activation(pointwise[level](depthwise(x)))  # type: ignore[index]
            found.append(self.predict(x))
        return found


class EvenConv2dSame(nn.Module):
    """A stride-2 depthwise convolution with TensorFlow's SAME padding, without a padded copy.

    SAME pads an even side more at its right and bottom, which torch's convolutions cannot: the
    photo is copied into a larger one first. A kernel with a row and a column of zeros before its
    first ones does the same with even padding. Odd sides go the usual way.
    """

    kernel: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take over a timm ``Conv2dSame``."""
        super().__init__()
        self.conv = conv
        layout = torch.channels_last
        kernel = F.pad(conv.weight.detach(), (1, 0, 1, 0)).contiguous(memory_format=layout)
        self.register_buffer("kernel", kernel, persistent=False)

    @staticmethod
    def suits(conv: nn.Module) -> bool:
        """Whether it is such a convolution; one over few channels is faster as it is."""
        return (
            isinstance(conv, Conv2dSame)
            and conv.stride == (2, 2)
            and conv.dilation == (1, 1)
            and conv.kernel_size in ((3, 3), (5, 5))
            and conv.groups == conv.in_channels == conv.out_channels > 8
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, ⌈H/2⌉, ⌈W/2⌉)."""
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            odd: torch.Tensor = self.conv(x)
            return odd
        side = self.conv.kernel_size[0] // 2
        return F.conv2d(x, self.kernel, self.conv.bias, 2, side, groups=self.conv.groups)


def optimize_for_inference(model: Model, compile: bool = False) -> Model:
    """Return a copy of a model that gives the same outputs sooner; it cannot be trained.

    BatchNorms are folded into the convolutions before them, in the encoder too; BiFPN's fusion
    weights become numbers; no padded copies are made; the layout is channels_last. The copy's
    outputs are compared with the model's on a random photo.

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
            folded = _folded(conv, norm)
            conv.weight, conv.bias = folded.weight, folded.bias
            _replace(model, names[norm], _what_follows(norm))


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a copy of a convolution that also does what the BatchNorm after it does."""
    assert norm.running_mean is not None and norm.running_var is not None
    result = copy.deepcopy(conv)
    weight, bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    result.weight = nn.Parameter(weight.detach(), requires_grad=False)
    result.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return result


def _what_follows(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what is left of a folded BatchNorm: in timm's BatchNormAct2d the activation."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
