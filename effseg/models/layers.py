"""Building blocks of BiFPN and the heads."""

# B batch, C channels, H W cells of a pyramid level.

import math

import torch
import torch.nn.functional as F
from timm.layers.norm_act import convert_sync_batchnorm as _timm_convert
from torch import nn

# Private: a public base of BatchNorms of any dimension would replace it.
from torch.nn.modules.batchnorm import _BatchNorm

from effseg.errors import InputError

BN_EPS = 1e-3
BN_MOMENTUM = 0.01
"""PyTorch's convention: 0.01 is decay 0.99 in the paper (appendix) and in TensorFlow."""


def activation_layer(name: str) -> nn.Module:
    """Return `silu` (D0–D7) or `relu6` (lite) as an in-place module."""
    layers: dict[str, type[nn.SiLU | nn.ReLU6]] = {"silu": nn.SiLU, "relu6": nn.ReLU6}
    if name not in layers:
        raise InputError(f"decoder_activation={name!r}: expected one of {', '.join(layers)}")
    return layers[name](inplace=True)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that also works on a single value per channel.

    P7 is 1×1 up to 128 pixels, so that a training batch of one image has one value per channel,
    and no variance. Such a call uses the running statistics without updating them; all others are
    PyTorch's.
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

    The bias before a BatchNorm is redundant, but the reference and its published weights have it.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        """Make both convolutions; the depthwise one may be dilated."""
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=False,
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        y: torch.Tensor = self.pointwise(self.depthwise(x))
        return y


class Lateral(nn.Sequential):
    """1×1 convolution with bias and BatchNorm, no activation, to BiFPN's width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make the layer."""
        super().__init__(nn.Conv2d(in_channels, out_channels, 1), BatchNorm2d(out_channels))


def downsample(x: torch.Tensor, even: bool = False) -> torch.Tensor:
    """Halve H and W, rounding up: 3×3 max-pool, stride 2, TensorFlow's SAME padding.

    SAME pads an odd side by one cell at both ends, an even side at the right or bottom only.
    `even` asserts even sides: `ceil_mode` then needs no padded copy, and a graph with dynamic sizes
    needs no guard.
    """
    if even:
        return F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
    # With this form of the remainder torch can prove that half of a symbolic side is not empty.
    # With side % 2 it guards by "h > 0 or w > 0", which torch 2.14's compile cache joins to the
    # other guards without brackets: it then returns graphs of wrong sizes.
    top, left = ((side + 1) // 2 * 2 - side for side in x.shape[-2:])
    x = F.pad(x, (left, 1, top, 1), value=-math.inf)
    return F.max_pool2d(x, kernel_size=3, stride=2)


def upsample_like(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Resize to the target's H and W by nearest neighbour, by any factor.

    Without autocast, which on CUDA would turn the result, and all sums with it, into float32.
    """
    size = target.shape[-2:]
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False):
            return F.interpolate(x, size=size, mode="nearest")
    return F.interpolate(x, size=size, mode="nearest")


def init_glorot(module: nn.Module) -> None:
    """Initialise BiFPN's convolutions as the reference does: Glorot uniform, biases 0.

    The fans of a depthwise kernel are counted per group, k·k in and out, as in
    rwightman/efficientdet-pytorch; PyTorch's initialiser would count every output channel.
    """
    for conv in _convolutions(module):
        receptive = conv.kernel_size[0] * conv.kernel_size[1]
        fan_in = conv.in_channels // conv.groups * receptive
        fan_out = conv.out_channels // conv.groups * receptive
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        nn.init.uniform_(conv.weight, -bound, bound)


def init_variance_scaling(module: nn.Module) -> None:
    """Initialise a head as the reference does: normal with std √(1 / fan_in), biases 0."""
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
    """Set the momentum of every BatchNorm (timm's encoders have 0.1, the paper 0.01)."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = momentum


def convert_sync_batchnorm(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace every BatchNorm by a SyncBatchNorm, in place.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` drops the activation of timm's
    BatchNorm-with-activation. timm's conversion, used here, keeps it; each layer's mode, frozen
    layers included, is kept too.

    Returns:
        (parent, name, BatchNorm) of each replaced layer; the new ones share its tensors.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, _timm_convert(child).train(child.training))
                replaced.append((parent, name, child))
    return replaced
