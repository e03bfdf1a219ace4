"""Evaluation protocols: at which size, in which pieces and how often the model sees an image."""

# H W pixels, N pixels of a side

import re
from dataclasses import dataclass
from typing import Literal

from effseg.errors import InputError

Kind = Literal["whole", "size", "short", "max", "slide", "ms+flip"]

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of `ms+flip`: those of the DeepLab papers and of mmseg's test-time augmentation."""

FORMS = (
    "whole, sizeN (longer side N pixels), shortN (shorter side N), "
    "maxN (longer side at most N pixels), slideN (windows of N x N) or ms+flip"
)

_SIZED = re.compile(r"(size|short|max|slide)([1-9][0-9]{0,4})", re.ASCII)


@dataclass(frozen=True)
class Protocol:
    """How an image is shown to the model. Every result carries the protocol's name.

    ========== ================================================================================
    name       what happens
    ========== ================================================================================
    whole      native scale, the whole image at once; the default
    sizeN      the longer side is scaled to N pixels, the ratio kept
    shortN     the shorter side is scaled to N pixels, the ratio kept; mmseg's test size without
               its cap on the longer side
    maxN       native scale, but a longer side beyond N pixels is scaled to N, the ratio kept
    slideN     native scale, windows of N × N pixels, at most two thirds of N apart, evenly from
               edge to edge; where windows overlap, the average of their logits,
               weighted by a Gaussian about each window's centre (σ = N / 8), in scoring as in
               prediction. An image that one window holds is seen as by `whole`
    ms+flip    scales 0.5, 0.75, 1, 1.25, 1.5, 1.75, each with its mirror image; the softmax
               probabilities of the 12 passes are averaged
    ========== ================================================================================

    In all of them what the model sees is padded at its right and bottom to a multiple of 128,
    logits are cropped and resized to the image's own size, and labels are never resized. Only
    `sizeN` of a network with both heads whose boxes have this size pads to N × N, as for boxes:
    one forward pass gives both.

    Examples:
        >>> Protocol.parse("size640").name
        'size640'
    """

    kind: Kind = "whole"
    size: int | None = None
    """N of sizeN, shortN, maxN and slideN, pixels."""

    def __post_init__(self) -> None:
        """Refuse a size where none belongs, and none where one does."""
        if self.name not in ("whole", "ms+flip") and not _SIZED.fullmatch(self.name):
            raise InputError(f"protocol {self.name!r}: expected {FORMS}")

    @classmethod
    def parse(cls, text: str) -> "Protocol":
        """Read a protocol from its name.

        Raises:
            InputError: no protocol is called so; the message lists the forms.
        """
        if text == "whole":
            return cls("whole")
        if text == "ms+flip":
            return cls("ms+flip")
        match = _SIZED.fullmatch(text)
        if match is None:
            raise InputError(f"protocol {text!r}: expected {FORMS}")
        return cls(match[1], int(match[2]))  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """What `parse` reads; printed with every result."""
        return f"{self.kind}{'' if self.size is None else self.size}"

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the (H, W) to which an image is scaled; `ms+flip` starts from its own size."""
        if self.kind == "size" and self.size is not None:
            return scaled(height, width, self.size / max(height, width))
        if self.kind == "max" and self.size is not None:
            return scaled(height, width, min(1.0, self.size / max(height, width)))
        if self.kind == "short" and self.size is not None:
            return scaled(height, width, self.size / min(height, width))
        return height, width


def scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    """Scale a size, halves rounded up, at least one pixel a side."""
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def window_starts(length: int, size: int) -> list[int]:
    """Return where the windows of `size` pixels begin along a side of `length` pixels.

    They overlap by a third or more, all alike: a last window that is moved back to the edge would
    overlap by nearly all, and what overlaps is held. A side no longer than `size` has one window.

    Examples:
        >>> window_starts(1000, 512)
        [0, 244, 488]
    """
    last = max(0, length - size)
    steps = -(-last // max(1, 2 * size // 3))
    return [last * i // max(1, steps) for i in range(steps + 1)]
