"""Auxiliary losses: linear classifiers on BiFPN's maps, in training only."""

# B batch, b images with masks, C channels, H W cells of a level, H' W' cells of P2, K classes.

import math
from collections.abc import Sequence

import torch
from torch import nn

from effseg.errors import InputError
from effseg.models.heads import upsample
from effseg.models.network import Network


class AuxiliaryClassifiers(nn.Module):
    """A 1×1 convolution to K logits on up to three top-down maps above the per-pixel head's.

    Deep supervision (Lee et al. 2015, arXiv 1409.5185): P3, P4 and P5 of BiFPN's last cell, through
    which the deep features reach P2, learn to tell the classes apart themselves. They belong to the
    loss: a saved model has none of them, and prediction costs nothing more. They start on the
    network's device and in its dtype.

    Args:
        model: network whose masks are trained.
        weight: of the mean of their losses, more than 0; PSPNet's is 0.4 (arXiv 1612.01105).

    Attributes:
        weight: as given.
        levels: of their maps, finest first.
        stride: of their logits, P2's.

    Raises:
        InputError: a negative or infinite weight, a network without masks, or a BiFPN without a
            top-down map of the encoder's levels above the per-pixel head's.
    """

    LEVELS = 3

    def __init__(self, model: Network, weight: float) -> None:
        """Make the classifiers."""
        super().__init__()
        if not 0 < weight < math.inf:
            raise InputError(f"auxiliary={weight}: expected 0 or more")
        if model.seg_classes is None:
            raise InputError(f"auxiliary={weight}: {type(model).__name__} has no masks to train")
        low, high = model.decoder.levels
        # Coarser levels than the encoder's have sides that do not divide the image's.
        last = min(low + self.LEVELS, high - 1, len(model.encoder.out_channels) - 1)
        self.weight, self.levels = weight, tuple(range(low + 1, last + 1))
        self.stride = 2**low
        if not self.levels:
            raise InputError(
                f"auxiliary={weight}: expected a BiFPN of three levels of the encoder or more, "
                f"not {low} to {high}"
            )
        self.classifiers = nn.ModuleList(
            nn.Conv2d(model.decoder.channels, model.seg_classes, 1) for _ in self.levels
        )
        self.to(model.mean)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map (B, C, H, W) of each level to logits (B, K, H', W') of P2's size."""
        return [
            upsample(classify(x), 2 ** (i + 1))
            for i, (classify, x) in enumerate(zip(self.classifiers, maps, strict=True))
        ]

    def sampled(self, masks: torch.Tensor) -> torch.Tensor:
        """Return the pixels (b, H', W') of masks (b, H, W) at the centres of P2's cells.

        On all pixels these losses would make a step of lite0 40 % longer (docs/research-log.md).
        """
        return masks[:, self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]
