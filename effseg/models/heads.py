"""The per-pixel head on P2 (EfficientDet, arXiv 1911.09070, section 5.2)."""

# B batch, C channels, H W cells of P2, h w cells of the encoder's last level, K classes.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.modules import Activation
from torch import nn

from effseg.errors import InputError
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
        context_channels: int = 0,
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
            context_channels: width of a coarse map whose own 1×1 classifier is added to the
                logits; 0: none.
            conv_activation: ``silu`` or ``relu6``.
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
        self.context_classifier = (
            nn.Conv2d(context_channels, classes, 1) if context_channels else None
        )
        self.stride = stride
        self.activation = Activation(activation)
        init_variance_scaling(self)
        if self.context_classifier is not None:
            # The encoder's last map is not normalised: random weights would add logits of any
            # size. From zero the model starts as the plain one, and the path's gradient is there
            # from the first step.
            nn.init.zeros_(self.context_classifier.weight)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map [P2 (B, C, H, W)] or [P2, context (B, C', h, w)] to (B, K, stride·H, stride·W)."""
        logits: torch.Tensor = self.classifier(self.convs(maps[0]))
        if self.context_classifier is not None:
            coarse = self.context_classifier(maps[1])
            logits = logits + F.interpolate(
                coarse, size=logits.shape[-2:], mode="bilinear", align_corners=False
            )
        logits = F.interpolate(
            logits, scale_factor=float(self.stride), mode="bilinear", align_corners=False
        )
        masks: torch.Tensor = self.activation(logits)
        return masks
