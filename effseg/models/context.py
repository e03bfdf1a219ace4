"""What our per-pixel head adds to the paper's: context from the encoder, and finer edges."""

# B batch, C channels, H W cells of the finest level, h w cells of the encoder's last level,
# K classes.

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from effseg.models.layers import BatchNorm2d, SeparableConv2d, activation_layer


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
        else:
            # A window in the padding may contain no cell of the image; its value is not used.
            near = pool(near * inside) / pool(inside).clamp(min=1 / self.WINDOW**2)
        logits[-1] = logits[-1] + near + self.photo(image_mean(last, inside))
        total = resize(logits[0], size)
        for x in logits[1:]:
            total = total + resize(x, size)
        return total


class ContextPyramid(nn.Module):
    """Dilated convolutions on the encoder's last two maps, for P2's features and logits.

    Atrous spatial pyramid pooling (arXiv 1706.05587) at half the encoder's last stride, where the
    paper's networks have a dilated encoder: both maps are projected and added, then come separable
    3×3 convolutions at three rates beside the map itself, and the average over the image. Its
    features are added to P2 before the head's convolutions, its logits to the head's.
    """

    RATES = (1, 3, 6)
    WIDTH = 96

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        classes: int,
        *,
        activation: str,
    ) -> None:
        """Make the pyramid for the last two maps' widths; P2 has `out_channels`."""
        super().__init__()
        width = self.WIDTH
        fine, coarse = channels
        self.fine = nn.Sequential(nn.Conv2d(fine, width, 1, bias=False), BatchNorm2d(width))
        self.coarse = nn.Sequential(nn.Conv2d(coarse, width, 1, bias=False), BatchNorm2d(width))
        self.activation = activation_layer(activation)
        self.mean = nn.Conv2d(coarse, width, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                SeparableConv2d(width, width, dilation=rate),
                BatchNorm2d(width),
                activation_layer(activation),
            )
            for rate in self.RATES
        )
        self.project = nn.Sequential(
            nn.Conv2d(width * (len(self.RATES) + 1), width, 1, bias=False),
            BatchNorm2d(width),
            activation_layer(activation),
        )
        self.features = nn.Sequential(
            nn.Conv2d(width, out_channels, 1, bias=False), BatchNorm2d(out_channels)
        )
        self.classifier = nn.Conv2d(width, classes, 1, bias=False)
        nn.init.zeros_(self.classifier.weight)

    def forward(
        self, maps: Sequence[torch.Tensor], inside: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the last two maps to (features, logits) at the resolution of the finer.

        The average excludes padding, where `inside` (B, 1, h, w) is 0.
        """
        fine, coarse = maps
        x = self.fine(fine) + resize(self.coarse(coarse), fine.shape[-2:])
        x = self.activation(x) + self.mean(image_mean(coarse, inside))
        x = self.project(torch.cat([x, *(branch(x) for branch in self.branches)], 1))
        return self.features(x), self.classifier(x)


class Refinement(nn.Module):
    """Correct upsampled logits by the encoder's map at half of P2's stride, for the edges.

    A depthwise-separable convolution over both; the last 1×1 starts at zero, so that training
    starts from the plain upsampled logits.
    """

    REDUCED = 16
    WIDTH = 64

    def __init__(self, channels: int, classes: int, *, activation: str) -> None:
        """Make the layers for a map of this width."""
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, self.REDUCED, 1, bias=False),
            BatchNorm2d(self.REDUCED),
            activation_layer(activation),
        )
        self.mix = nn.Sequential(
            SeparableConv2d(classes + self.REDUCED, self.WIDTH),
            BatchNorm2d(self.WIDTH),
            activation_layer(activation),
        )
        self.correct = nn.Conv2d(self.WIDTH, classes, 1)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)  # type: ignore[arg-type]

    def forward(self, logits: torch.Tensor, detail: torch.Tensor) -> torch.Tensor:
        """Map logits (B, K, H, W) and the finer map to logits at the finer resolution."""
        logits = resize(logits, detail.shape[-2:])
        correction: torch.Tensor = self.correct(
            self.mix(torch.cat([logits, self.reduce(detail)], 1))
        )
        return logits + correction


def image_mean(x: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    """Return the mean (B, C, 1, 1) over the cells where `inside` is 1; None: over all."""
    if inside is None:
        return x.mean((2, 3), keepdim=True)
    return (x * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True)


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize (B, C, h, w) bilinearly to `size` (H, W), with half-pixel centres."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def inside_cells(coarsest: torch.Tensor, stride: int, sizes: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, h, w), 1 at the cells of the coarsest map that overlap the image."""
    rows, columns = coarsest.shape[-2:]
    cells = ((sizes + stride - 1) // stride).to(coarsest.device)
    y = torch.arange(rows, device=cells.device) < cells[:, :1]
    column = torch.arange(columns, device=cells.device) < cells[:, 1:]
    return (y[:, None, :, None] & column[:, None, None, :]).to(coarsest.dtype)
