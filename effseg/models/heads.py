"""The heads of EfficientDet (arXiv 1911.09070): per pixel on P2, and detection."""

# B batch, C channels, H W cells of a level, h w cells of the encoder's last level, K classes,
# A anchors of all levels.

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.modules import Activation
from torch import nn

from effseg.errors import InputError
from effseg.models.boxes import ANCHOR_SHAPES, OCTAVES, prior_bias
from effseg.models.layers import (
    BN_MOMENTUM,
    BatchNorm2d,
    SeparableConv2d,
    activation_layer,
    init_variance_scaling,
)


class SegmentationHead(nn.Module):
    """Separable 3×3 convolutions on the finest map, a 1×1 classifier, bilinear upsampling.

    256 channels and 3 repeats are the paper's; that the convolutions are separable follows from its
    parameter and FLOP counts; bilinear upsampling (half-pixel centres) is our choice.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        channels: int = 256,
        layers: int = 3,
        stride: int = 4,
        context_channels: Sequence[int] = (),
        conv_activation: str = "silu",
        activation: str | None = None,
        bn_momentum: float = BN_MOMENTUM,
    ) -> None:
        """Make the head.

        Args:
            in_channels: width of the map.
            classes: K, background included.
            channels: width of the convolutions.
            layers: number of convolutions.
            stride: stride of the map, and factor of the upsampling.
            context_channels: widths of the coarse maps of `ContextClassifiers`; (): none.
            conv_activation: `silu` or `relu6`.
            activation: output activation, by smp's names; None gives logits.
            bn_momentum: momentum of the BatchNorms.
        """
        super().__init__()
        sizes = {"classes": classes, "head_channels": channels, "head_layers": layers}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name}={value}: expected at least 1")
        blocks: list[nn.Module] = []
        for index in range(layers):
            blocks += [
                SeparableConv2d(in_channels if index == 0 else channels, channels),
                BatchNorm2d(channels, bn_momentum),
                activation_layer(conv_activation),
            ]
        self.convs = nn.Sequential(*blocks)
        self.classifier = nn.Conv2d(channels, classes, 1)
        self.context = ContextClassifiers(context_channels, classes) if context_channels else None
        self.stride = stride
        self.activation = Activation(activation)
        init_variance_scaling(self.convs)
        init_variance_scaling(self.classifier)

    def forward(
        self, maps: Sequence[torch.Tensor], inside: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map [P2 (B, C, H, W), context maps …] to (B, K, stride·H, stride·W)."""
        masks: torch.Tensor = self.activation(upsample(self.coarse(maps, inside), self.stride))
        return masks

    def coarse(
        self, maps: Sequence[torch.Tensor], inside: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map the same to logits at the resolution of P2, (B, K, H, W).

        `inside` (B, 1, h, w) is 1 at the cells of the coarsest map that are not padding.
        """
        logits: torch.Tensor = self.classifier(self.convs(maps[0]))
        if self.context is None:
            return logits
        context: torch.Tensor = self.context(maps[1:], logits.shape[-2:], inside)
        return logits + context


class ContextClassifiers(nn.Module):
    """Linear classifiers on the encoder's coarse maps, and on averages of the last one.

    Each coarse map has a 1×1 classifier. The last has two more: on its average over 5×5 cells
    (without padding) and over the whole image. The sum is added to P2's logits. Not in the paper:
    the deep features encode ImageNet's classes, but the path through three cells and a head learns
    to use them slowly. The averages replace pyramid pooling (arXiv 1612.01105).
    """

    WINDOW = 5

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        """Make classifiers for maps of these widths, fine to coarse."""
        super().__init__()
        # Without biases: the head's own classifier has one.
        make = partial(nn.Conv2d, out_channels=classes, kernel_size=1, bias=False)
        self.levels = nn.ModuleList(make(c) for c in channels)
        self.window = make(channels[-1])
        self.photo = make(channels[-1])  # of the whole image; a key of saved models
        # Zero: the encoder's maps are not normalised, so random weights would add logits of any
        # magnitude. The gradient is not zero.
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(
        self,
        maps: Sequence[torch.Tensor],
        size: Sequence[int],
        inside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, C', h, w) of each level to logits (B, K, H, W), `size` (H, W).

        Averages exclude padding, where `inside` (B, 1, h, w) is 0.
        """
        last = maps[-1]
        logits = [classify(x) for classify, x in zip(self.levels, maps, strict=True)]
        # Averaging and classifying are linear: average K channels instead of C'.
        pool = partial(F.avg_pool2d, kernel_size=self.WINDOW, stride=1, padding=self.WINDOW // 2)
        near = self.window(last)
        if inside is None:
            near = pool(near, count_include_pad=False)
            mean = last.mean((2, 3), keepdim=True)
        else:
            # A window in the padding may contain no cell of the image; its value is not used.
            near = pool(near * inside) / pool(inside).clamp(min=1 / self.WINDOW**2)
            mean = (last * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True)
        logits[-1] = logits[-1] + near + self.photo(mean)
        scaled = [
            F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False) for x in logits
        ]
        total = scaled[0]
        for x in scaled[1:]:
            total = total + x
        return total


class LevelHead(nn.Module):
    """Separable convolutions shared by all levels, with one BatchNorm per level.

    As in the reference (google/automl `efficientdet_keras.py`): statistics differ between levels.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        layers: int,
        levels: int,
        activation: str = "silu",
        bn_momentum: float = BN_MOMENTUM,
    ) -> None:
        """Make `layers` convolutions and a final one to `outputs` channels."""
        super().__init__()
        if layers < 1:
            raise InputError(f"head_layers={layers}: expected at least 1")
        self.convs = nn.ModuleList(SeparableConv2d(channels, channels) for _ in range(layers))
        self.norms = nn.ModuleList(
            nn.ModuleList(BatchNorm2d(channels, bn_momentum) for _ in range(levels))
            for _ in range(layers)
        )
        self.activation = activation_layer(activation)
        self.predict = SeparableConv2d(channels, outputs)
        init_variance_scaling(self)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map each level (B, C, H, W) to (B, outputs, H, W)."""
        outputs: list[torch.Tensor] = []
        for level, x in enumerate(maps):
            for conv, norms in zip(self.convs, self.norms, strict=True):
                x = self.activation(norms[level](conv(x)))  # type: ignore[index]
            outputs.append(self.predict(x))
        return outputs


class DetectionHead(nn.Module):
    """Class and box predictions at 9 anchors per cell (sections 4.2 and 5.1).

    The class bias starts at -4.595, a probability of 0.01.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        layers: int = 3,
        levels: int = 5,
        shapes: int = len(ANCHOR_SHAPES),
        activation: str = "silu",
        bn_momentum: float = BN_MOMENTUM,
    ) -> None:
        """Make both nets.

        Args:
            channels: width of the pyramid and of the convolutions.
            classes: K, no background.
            layers: convolutions before the prediction.
            levels: number of pyramid levels.
            shapes: anchor shapes per cell; each comes in 3 sizes.
            activation: `silu` or `relu6`.
            bn_momentum: momentum of the BatchNorms.
        """
        super().__init__()
        if classes < 1:
            raise InputError(f"classes={classes}: expected at least 1")
        anchors = shapes * OCTAVES
        make = partial(
            LevelHead,
            channels,
            layers=layers,
            levels=levels,
            activation=activation,
            bn_momentum=bn_momentum,
        )
        self.class_net = make(anchors * classes)
        self.box_net = make(anchors * 4)
        self.classes = classes
        nn.init.constant_(self.class_net.predict.pointwise.bias, prior_bias())  # type: ignore[arg-type]

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the levels, fine to coarse, to class logits (B, A, K) and box codes (B, A, 4)."""
        return by_anchor(self.class_net(maps), self.classes), by_anchor(self.box_net(maps), 4)


def inside_cells(coarsest: torch.Tensor, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, h, w), 1 at the cells of the coarsest map that overlap the image."""
    rows, columns = coarsest.shape[-2:]
    stride = (x.shape[-2] + rows - 1) // rows
    cells = ((sizes + stride - 1) // stride).to(x.device)
    y = torch.arange(rows, device=x.device) < cells[:, :1]
    column = torch.arange(columns, device=x.device) < cells[:, 1:]
    return (y[:, None, :, None] & column[:, None, None, :]).to(coarsest.dtype)


def upsample(logits: torch.Tensor, stride: int) -> torch.Tensor:
    """Upsample logits (B, K, H, W) bilinearly, with half-pixel centres."""
    size = [side * stride for side in logits.shape[-2:]]  # integers, for symbolic sizes
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def by_anchor(maps: Sequence[torch.Tensor], values: int) -> torch.Tensor:
    """Concatenate the predictions of all levels (B, 9·V, H, W) to (B, A, V).

    A runs over levels, rows, columns, anchors of a cell; a channel is (anchor, value).
    """
    # x.shape[0], because len() would turn an export's symbolic batch size into a number.
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values) for x in maps], 1)
