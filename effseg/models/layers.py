"""Building blocks that BiFPN and the heads share."""

# B batch, C channels, H W cells of a pyramid level.

import math

import torch
import torch.nn.functional as F
from timm.layers.norm_act import convert_sync_batchnorm as _timm_convert
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from effseg.errors import InputError

BN_EPS = 1e-3
BN_MOMENTUM = 0.01
"""PyTorch's convention: 0.01 here is the decay 0.99 of the paper (appendix) and of TensorFlow."""


def activation_layer(name: str) -> nn.Module:
    """Return `silu` (D0–D7) or `relu6` (lite) as an in-place module."""
    layers: dict[str, type[nn.SiLU | nn.ReLU6]] = {"silu": nn.SiLU, "relu6": nn.ReLU6}
    if name not in layers:
        raise InputError(f"decoder_activation={name!r}: expected one of {', '.join(layers)}")
    return layers[name](inplace=True)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that survives a level of one cell.

    P7 is 1×1 up to 128 pixels, and with one photo a training batch then holds one value a channel,
    which has no variance. Such a call uses the running statistics and leaves them alone; all
    others are PyTorch's own.
    """

    def __init__(self, channels: int, momentum: float = BN_MOMENTUM) -> None:
        """Make the layer with the reference's epsilon, 1e-3."""
        super().__init__(channels, eps=BN_EPS, momentum=momentum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, H, W)."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class SeparableConv2d(nn.Module):
    """Depthwise 3×3 without bias, then pointwise 1×1 with bias, stride 1, same size.

    The bias before a BatchNorm is redundant; the reference has it, and its published weights carry
    it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make both convolutions."""
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        y: torch.Tensor = self.pointwise(self.depthwise(x))
        return y


class Lateral(nn.Sequential):
    """1×1 convolution with bias and BatchNorm, no activation: to BiFPN's width."""

    def __init__(self, in_channels: int, out_channels: int, bn_momentum: float) -> None:
        """Make the layer."""
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1), BatchNorm2d(out_channels, bn_momentum)
        )


def downsample(x: torch.Tensor, even: bool = False) -> torch.Tensor:
    """Halve H and W, rounding up: 3×3 max-pool, stride 2, TensorFlow's SAME padding.

    SAME pads an odd side by one cell at both ends and an even side at its right or bottom only.
    `even` promises even sides: `ceil_mode` then does it without a padded copy, and a graph with
    dynamic sizes has nothing to ask.
    """
    if even:
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
    # In this form of the remainder torch can prove that the halves of symbolic sides have a cell.
    # From side % 2 it cannot, and guards by "h > 0 or w > 0", which the cache of compiled graphs of
    # torch 2.14 joins to the other guards without brackets: it then gives graphs of other sizes.
    top, left = ((side + 1) // 2 * 2 - side for side in x.shape[-2:])
    x = F.pad(x, (left, 1, top, 1), value=-math.inf)
    return F.max_pool2d(x, kernel_size=3, stride=2)


def upsample_like(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Resize to the target's H and W by nearest neighbour; any size works, not only twice.

    Outside autocast, which on CUDA would make this map, and all that it is added to, float32.
    """
    size = target.shape[-2:]
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False):
            return F.interpolate(x, size=size, mode="nearest")
    return F.interpolate(x, size=size, mode="nearest")


def init_glorot(module: nn.Module) -> None:
    """Initialise BiFPN's convolutions as the reference: Glorot uniform, biases 0.

    A depthwise kernel's fans are counted per group, k·k in and out (rwightman/efficientdet-pytorch
    does the same; PyTorch's own initialiser would count every output channel).
    """
    for conv in _convolutions(module):
        receptive = conv.kernel_size[0] * conv.kernel_size[1]
        fan_in = conv.in_channels // conv.groups * receptive
        fan_out = conv.out_channels // conv.groups * receptive
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        nn.init.uniform_(conv.weight, -bound, bound)


def init_variance_scaling(module: nn.Module) -> None:
    """Initialise a head as the reference: normal with std √(1 / fan_in), biases 0."""
    for conv in _convolutions(module):
        fan_in = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        nn.init.normal_(conv.weight, std=math.sqrt(1.0 / fan_in))


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return convs


def set_bn_momentum(module: nn.Module, momentum: float) -> None:
    """Set the momentum of every BatchNorm (in encoders timm leaves 0.1, the paper has 0.01)."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = momentum


def convert_sync_batchnorm(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace every BatchNorm by one that is synchronised over all processes, in place.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would replace timm's BatchNorm-with-activation
    by a BatchNorm alone, so that an encoder trains without activations. timm's conversion, used
    here, keeps them; the mode of each layer, frozen ones among them, is kept too.

    Returns:
        (parent, name, BatchNorm) of each that was replaced; the new ones have the same tensors.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, _timm_convert(child).train(child.training))
                replaced.append((parent, name, child))
    return replaced
