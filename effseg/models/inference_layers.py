"""What an optimised copy has in place of a model's layers; none of it can be trained."""

# B batch, C channels, H W pixels.

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from effseg.models.bifpn import Fuse
from effseg.models.heads import LevelHead


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
            nn.ModuleList(fold_norm(conv.pointwise, norm) for norm in levels)
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


class VectorSqueezeExcite(nn.Module):
    """timm's squeeze-and-excitation, its two convolutions as products with a vector.

    A convolution over one cell costs what any costs to start, several times what a product does.
    The map is multiplied in place; a block reads it nowhere else.
    """

    def __init__(self, squeeze: SqueezeExcite) -> None:
        """Take over the weights and functions."""
        super().__init__()
        reduce, expand = squeeze.conv_reduce, squeeze.conv_expand
        self.reduce, self.expand = _as_linear(reduce), _as_linear(expand)
        self.activation, self.gate = squeeze.act1, squeeze.gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        # Both axes at once, inductor (torch 2.14) sums a few channels over the whole map, then the
        # next ones, and so fetches the map from memory anew; one row of it stays in the cache.
        by_row = torch.compiler.is_compiling() and x.device.type == "cpu"
        means = x.mean(3).mean(2) if by_row else x.mean((2, 3))
        gates = self.gate(self.expand(self.activation(self.reduce(means))))
        return x.mul_(gates[:, :, None, None])


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
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


def _as_linear(conv: nn.Conv2d) -> nn.Linear:
    """Return a 1×1 convolution as what it does to one cell."""
    assert conv.kernel_size == (1, 1) and conv.groups == 1
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    if conv.bias is not None:
        linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear
