"""The heads of EfficientDet (arXiv 1911.09070): per pixel on P2, and detection."""

# B batch, C channels, H W cells of a level, h w cells of the encoder's last level, K classes,
# A anchors of all levels.

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from segmentation_models_pytorch.base import ClassificationHead
from segmentation_models_pytorch.base.modules import Activation
from torch import nn

from effseg.errors import InputError, flat
from effseg.models.boxes import ANCHOR_SHAPES, OCTAVES, PRIOR_BIAS
from effseg.models.context import ContextClassifiers, ContextPyramid, Refinement, resize
from effseg.models.layers import (
    BatchNorm2d,
    SeparableConv2d,
    activation_layer,
    init_variance_scaling,
)


class SegmentationHead(nn.Module):
    """Separable 3×3 convolutions on the finest map, a 1×1 classifier, bilinear upsampling.

    256 channels and 3 repeats are the paper's; that the convolutions are separable follows from its
    parameter and FLOP counts; bilinear upsampling (half-pixel centres) is our choice. `context`,
    `pyramid` and `refinement` are ours too, see `effseg.models.context`.

    Attributes:
        reads: levels of the encoder's maps that `forward` needs.
        averages: whether it averages over the whole image, which must then exclude padding.
        stride: of the logits before the last upsampling.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        channels: int = 256,
        layers: int = 3,
        level: int = 2,
        encoder_channels: Sequence[int] = (),
        context: bool = False,
        pyramid: bool = False,
        refinement: bool = False,
        conv_activation: str = "silu",
        activation: str | None = None,
    ) -> None:
        """Make the head.

        Args:
            in_channels: width of the finest map.
            classes: K, background included.
            channels: width of the convolutions.
            layers: number of convolutions.
            level: of the finest map, which has stride 2^level.
            encoder_channels: widths of the encoder's maps, index = level.
            context: add `ContextClassifiers` on the encoder's coarser maps.
            pyramid: add a `ContextPyramid` on the encoder's last two maps.
            refinement: add a `Refinement` by the encoder's map of the level below.
            conv_activation: `silu` or `relu6`.
            activation: output activation, by smp's names; None gives logits.

        Raises:
            InputError: a size below 1, an unknown activation, or a refinement without a map at
                its level.
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
                BatchNorm2d(channels),
                activation_layer(conv_activation),
            ]
        self.convs = nn.Sequential(*blocks)
        self.classifier = nn.Conv2d(channels, classes, 1)
        last = len(encoder_channels) - 1
        # If the encoder ends at the finest level: its last map.
        self.coarser = range(min(level + 1, last), last + 1) if context else range(0)
        self.last_two = range(last - 1, last + 1) if pyramid else range(0)
        self.finer = range(level - 1, level) if refinement else range(0)
        self.reads = sorted({*self.finer, *self.coarser, *self.last_two})
        self.averages = context or pyramid
        self.stride = 2 ** (level - 1 if refinement else level)
        self.context = self.pyramid = self.refinement = None
        if context:
            self.context = ContextClassifiers([encoder_channels[i] for i in self.coarser], classes)
        if pyramid:
            widths = [encoder_channels[i] for i in self.last_two]
            self.pyramid = ContextPyramid(widths, in_channels, classes, activation=conv_activation)
        if refinement:
            if encoder_channels[level - 1] == 0:  # smp's placeholder, of transformers
                raise InputError(
                    f"head_refinement=True: this encoder has no features at level {level - 1}"
                )
            self.refinement = Refinement(
                encoder_channels[level - 1], classes, activation=conv_activation
            )
        if activation == "argmax":
            raise InputError("activation='argmax': smp's has no dimension, expected 'argmax2d'")
        try:
            self.activation = Activation(activation)
        except ValueError as error:
            raise InputError(f"activation={activation!r}: {flat(error)}") from error
        init_variance_scaling(self.convs)
        init_variance_scaling(self.classifier)

    def forward(
        self,
        x: torch.Tensor,
        features: Mapping[int, torch.Tensor],
        inside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map P2 (B, C, H, W) and the encoder's maps by level to (B, K, 2^level·H, 2^level·W)."""
        masks: torch.Tensor = self.activation(
            upsample(self.coarse(x, features, inside), self.stride)
        )
        return masks

    def coarse(
        self,
        x: torch.Tensor,
        features: Mapping[int, torch.Tensor],
        inside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map the same to logits before the last upsampling.

        `inside` (B, 1, h, w) is 1 at the cells of the coarsest map that are not padding.
        """
        size = x.shape[-2:]
        added: list[torch.Tensor] = []
        if self.context is not None:
            added.append(self.context([features[i] for i in self.coarser], size, inside))
        if self.pyramid is not None:
            context, logits = self.pyramid([features[i] for i in self.last_two], inside)
            x = x + resize(context, size)
            added.append(resize(logits, size))
        total: torch.Tensor = self.classifier(self.convs(x))
        for logits in added:
            total = total + logits
        if self.refinement is not None:
            total = self.refinement(total, features[self.finer[0]])
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
    ) -> None:
        """Make `layers` convolutions and a final one to `outputs` channels."""
        super().__init__()
        if layers < 1:
            raise InputError(f"head_layers={layers}: expected at least 1")
        self.convs = nn.ModuleList(SeparableConv2d(channels, channels) for _ in range(layers))
        self.norms = nn.ModuleList(
            nn.ModuleList(BatchNorm2d(channels) for _ in range(levels)) for _ in range(layers)
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
            dtype = self.predict.pointwise.weight.dtype
            if self.training or x.dtype == dtype:
                outputs.append(self.predict(x))
                continue
            # Under autocast. Boxes are ranked by the logits; bfloat16 has ties among the best.
            with torch.autocast(x.device.type, enabled=False):
                outputs.append(self.predict(x.to(dtype)))
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
    ) -> None:
        """Make both nets.

        Args:
            channels: width of the pyramid and of the convolutions.
            classes: K, no background.
            layers: convolutions before the prediction.
            levels: number of pyramid levels.
            shapes: anchor shapes per cell; each comes in 3 sizes.
            activation: `silu` or `relu6`.
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
        )
        self.class_net = make(anchors * classes)
        self.box_net = make(anchors * 4)
        self.classes = classes
        nn.init.constant_(self.class_net.predict.pointwise.bias, PRIOR_BIAS)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the levels, fine to coarse, to class logits (B, A, K) and box codes (B, A, 4)."""
        return by_anchor(self.class_net(maps), self.classes), by_anchor(self.box_net(maps), 4)


def classification_head(
    channels: int, aux_params: dict[str, Any] | None
) -> ClassificationHead | None:
    """Return smp's classification head on maps of this width, None without `aux_params`.

    Raises:
        InputError: arguments that smp's head does not take.
    """
    if not aux_params:
        return None
    try:
        return ClassificationHead(channels, **aux_params)
    except (TypeError, ValueError) as error:
        raise InputError(f"aux_params={aux_params!r}: {flat(error)}") from error


def upsample(logits: torch.Tensor, stride: int) -> torch.Tensor:
    """Upsample logits (B, K, H, W) bilinearly, with half-pixel centres."""
    size = [side * stride for side in logits.shape[-2:]]  # integers, for symbolic sizes
    return resize(logits, size)


def by_anchor(maps: Sequence[torch.Tensor], values: int) -> torch.Tensor:
    """Concatenate the predictions of all levels (B, 9·V, H, W) to (B, A, V).

    A runs over levels, rows, columns, anchors of a cell; a channel is (anchor, value).
    """
    # x.shape[0], because len() would turn an export's symbolic batch size into a number.
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values) for x in maps], 1)
