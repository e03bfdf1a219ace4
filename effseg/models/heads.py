"""The heads of EfficientDet (arXiv 1911.09070): per pixel on P2, and of the detector."""

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

    The paper says that the head has 256 channels and is repeated 3 times; that it is separable
    follows from its counts of parameters and FLOPs, that it upsamples bilinearly (half-pixel
    centres) is our choice.
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
            stride: of the map: the factor of the upsampling.
            context_channels: widths of the coarse maps of `ContextClassifiers`; none: ().
            conv_activation: `silu` or `relu6`.
            activation: of the output, by smp's names; None gives logits.
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
        """Map the same to logits of P2's own size (B, K, H, W).

        `inside` (B, 1, h, w) is 1 at the cells of the coarsest map that are not padding.
        """
        logits: torch.Tensor = self.classifier(self.convs(maps[0]))
        if self.context is None:
            return logits
        context: torch.Tensor = self.context(maps[1:], logits.shape[-2:], inside)
        return logits + context


class ContextClassifiers(nn.Module):
    """Linear classifiers on the encoder's coarse maps, and on the last one averaged.

    Each coarse map has a 1×1 classifier. The last has two more: of its average over 5×5 cells
    (borders left out) and over the whole image. The sum is added to P2's logits. Not in the paper:
    the deep features hold ImageNet's classes, which through three cells and a head reach the
    logits late. The averages take the place of pyramid pooling (arXiv 1612.01105).
    """

    WINDOW = 5

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        """Make classifiers of maps of these widths, fine to coarse."""
        super().__init__()
        # Without biases: the head's own classifier has one.
        make = partial(nn.Conv2d, out_channels=classes, kernel_size=1, bias=False)
        self.levels = nn.ModuleList(make(c) for c in channels)
        self.window = make(channels[-1])
        self.photo = make(channels[-1])
        # The encoder's maps are not normalised: random weights would add logits of any size.
        # From zero the model starts as the plain one; the gradient is there from the first step.
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(
        self,
        maps: Sequence[torch.Tensor],
        size: Sequence[int],
        inside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, C', h, w) of each level to logits (B, K, H, W), `size` (H, W).

        Averages leave out what `inside` (B, 1, h, w) marks with 0 as padding.
        """
        last = maps[-1]
        logits = [classify(x) for classify, x in zip(self.levels, maps, strict=True)]
        # Averaging and classifying are linear: K channels are averaged in place of C'.
        pool = partial(F.avg_pool2d, kernel_size=self.WINDOW, stride=1, padding=self.WINDOW // 2)
        near = self.window(last)
        if inside is None:
            near = pool(near, count_include_pad=False)
            mean = last.mean((2, 3), keepdim=True)
        else:
            # A window around a cell of the padding may hold no cell of the image; nobody reads it.
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
    """Separable convolutions that all levels share, with a BatchNorm of its own for each level.

    The levels' statistics differ, their features do not (google/automl `efficientdet_keras.py`).
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
        """Make `layers` convolutions and one that predicts `outputs` channels."""
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
    """Class and box predictions at 9 anchors a cell (sections 4.2 and 5.1).

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
            shapes: anchor shapes a cell; each comes in 3 sizes.
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
    """Return (B, 1, h, w), 1 at the cells of the coarsest map that hold some of the image."""
    rows, columns = coarsest.shape[-2:]
    stride = (x.shape[-2] + rows - 1) // rows
    cells = ((sizes + stride - 1) // stride).to(x.device)
    y = torch.arange(rows, device=x.device) < cells[:, :1]
    column = torch.arange(columns, device=x.device) < cells[:, 1:]
    return (y[:, None, :, None] & column[:, None, None, :]).to(coarsest.dtype)


def upsample(logits: torch.Tensor, stride: int) -> torch.Tensor:
    """Enlarge logits (B, K, H, W) bilinearly, with half-pixel centres."""
    size = [side * stride for side in logits.shape[-2:]]  # no float, which symbolic sizes dislike
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def by_anchor(maps: Sequence[torch.Tensor], values: int) -> torch.Tensor:
    """Put the predictions of all levels (B, 9·V, H, W) in a row of anchors (B, A, V).

    A runs over levels, rows, columns, anchors of a cell; a channel is (anchor, value).
    """
    # Of the shape: len() would make a number of an export's symbolic batch size.
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values) for x in maps], 1)
