"""Evaluation protocols: at which scale, in which windows and how often an image is run."""

# H W pixels, N pixels of a side

import re
from dataclasses import dataclass
from typing import Literal

from effseg.errors import InputError

Kind = Literal["whole", "size", "short", "max", "slide", "ms+flip"]

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of `ms+flip`: those of the DeepLab papers and of mmseg's test-time augmentation."""

_SIZED = re.compile(r"(size|short|max|slide)([1-9][0-9]{0,4})", re.ASCII)


@dataclass(frozen=True)
class Protocol:
    """How an image is run through the model. Every result carries the protocol's name.

    ========== ================================================================================
    name       what happens
    ========== ================================================================================
    whole      native scale, the whole image; the default
    sizeN      the longer side is scaled to N pixels
    shortN     the shorter side is scaled to N pixels; mmseg's test size without its cap on the
               longer side
    maxN       native scale, but a longer side above N pixels is scaled to N
    slideN     native scale, windows of N × N pixels at most two thirds of N apart, evenly spaced;
               overlapping logits are averaged with Gaussian weights around the windows' centres
               (σ = N / 8). An image that fits one window is run as by `whole`
    ms+flip    scales 0.5, 0.75, 1, 1.25, 1.5, 1.75, each with its mirror image; the softmax
               probabilities of the 12 passes are averaged
    ========== ================================================================================

    The model's input is padded at its right and bottom to a multiple of 128, logits are cropped and
    resized to the image's size, and labels are never resized. If a network has both heads and its
    boxes have the same N, `sizeN` pads to N × N instead: one forward pass gives both.

    Examples:
        >>> Protocol.parse("size640").name
        'size640'
    """

    kind: Kind = "whole"
    size: int | None = None
    """N of sizeN, shortN, maxN and slideN, pixels."""

    def __post_init__(self) -> None:
        """Check that there is a size exactly if the kind takes one."""
        if self.name not in ("whole", "ms+flip") and not _SIZED.fullmatch(self.name):
            raise InputError(
                f"protocol {self.name!r}: expected whole, sizeN (longer side N pixels), shortN "
                "(shorter side N), maxN (longer side at most N pixels), slideN (windows of N x N) "
                "or ms+flip"
            )

    @classmethod
    def parse(cls, text: str) -> "Protocol":
        """Read a protocol from its name.

        Raises:
            InputError: no such protocol; the message lists the forms.
        """
        match = _SIZED.fullmatch(text)
        return cls(match[1], int(match[2])) if match else cls(text)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name that `parse` reads; printed with every result."""
        return f"{self.kind}{'' if self.size is None else self.size}"

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the (H, W) to which an image is scaled; for `ms+flip` its size."""
        if self.size is None or self.kind == "slide":
            return height, width
        side = min(height, width) if self.kind == "short" else max(height, width)
        scale = self.size / side
        return scaled(height, width, min(1.0, scale) if self.kind == "max" else scale)


def scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """Scale a size, halves rounded up, at least one pixel per side."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def window_starts(length: int, size: int) -> list[int]:
    """Return the offsets of windows of `size` pixels along a side of `length` pixels.

    They overlap evenly by a third or more: a last window moved back to the edge could overlap
    almost entirely, and overlaps are held in memory. A side up to `size` has one window.

    Examples:
        >>> window_starts(1000, 512)
        [0, 244, 488]
    """
    last = max(0, length - size)
    steps = -(-last // max(1, 2 * size // 3))
    return [last * i // max(1, steps) for i in range(steps + 1)]
