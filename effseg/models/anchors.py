"""Anchors of the detector, and the code that relates a box to one."""

# A anchors, N boxes, H W pixels. Boxes are x1 y1 x2 y2 in pixels, codes (ty, tx, th, tw).

import math
from collections.abc import Sequence

import torch

OCTAVES = 3
"""Sizes of a level's anchors: its base times 2^(0/3), 2^(1/3), 2^(2/3)."""
ANCHOR_SHAPES: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
"""(width, height) factors of an anchor: ratios 1, 2 and ½. The published weights were trained with
these rounded values; √2 and √½ differ by 1 %."""

_TINY = 1e-7


def level_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    """Return (rows, columns) of a level: the photo's sides over 2^level, rounded up."""
    return -(-size[0] // 2**level), -(-size[1] // 2**level)


def make_anchors(
    size: tuple[int, int],
    levels: tuple[int, int] = (3, 7),
    scale: float = 4.0,
    shapes: Sequence[tuple[float, float]] = ANCHOR_SHAPES,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the anchors of a photo: level by level from fine to coarse, then rows, columns.

    Each cell has 9: octaves (outer) by shapes (inner). Their base side is ``scale`` times the
    cell's. A cell's side is the photo's over the number of cells, as in the reference
    (google/automl ``anchors.py``): at 320 pixels P7 has 3 cells of 106.7 pixels.

    Args:
        size: (H, W) of the photo as the network sees it, padding included.
        levels: finest and coarsest level.
        scale: 4 in the paper.
        shapes: (width, height) factors.
        device: where to.

    Returns:
        (A, 4) float32, x1 y1 x2 y2 in pixels; they may reach over the photo's edge.

    >>> make_anchors((512, 512)).shape
    torch.Size([49104, 4])
    """
    found = []
    sides = torch.tensor(
        [
            (width * 2 ** (octave / OCTAVES), height * 2 ** (octave / OCTAVES))
            for octave in range(OCTAVES)
            for width, height in shapes
        ],
        dtype=torch.float64,
    )
    for level in range(levels[0], levels[1] + 1):
        rows, columns = level_size(size, level)
        cell = torch.tensor([size[1] / columns, size[0] / rows], dtype=torch.float64)
        y = (torch.arange(rows, dtype=torch.float64) + 0.5) * cell[1]
        x = (torch.arange(columns, dtype=torch.float64) + 0.5) * cell[0]
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
        half = sides * cell * scale / 2
        found.append(torch.cat([centres - half, centres + half], -1).reshape(-1, 4))
    return torch.cat(found).float().to(device)


def encode(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the codes of boxes relative to anchors, both (…, 4) and broadcast.

    ty = (y - ya) / ha, th = log(h / ha), and the same in x, with centres and sides; no further
    factors.
    """
    centre, side = _centre_and_side(boxes)
    centre_a, side_a = _centre_and_side(anchors)
    side, side_a = side + _TINY, side_a + _TINY
    shift = (centre - centre_a) / side_a
    stretch = (side / side_a).log()
    return torch.stack([shift[..., 1], shift[..., 0], stretch[..., 1], stretch[..., 0]], -1)


def decode(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the boxes that codes (…, 4) mean at anchors (…, 4): the inverse of :func:`encode`.

    >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 16.0]])
    >>> decode(encode(anchors + 1, anchors), anchors)
    tensor([[ 1.,  1.,  9., 17.]])
    """
    centre_a, side_a = _centre_and_side(anchors)
    ty, tx, th, tw = codes.unbind(-1)
    centre = torch.stack([tx, ty], -1) * side_a + centre_a
    half = torch.stack([tw, th], -1).exp() * side_a / 2
    return torch.cat([centre - half, centre + half], -1)


def prior_bias(probability: float = 0.01) -> float:
    """Return the bias at which a sigmoid gives ``probability``: -4.595 for 0.01.

    Almost all anchors are background: starting there keeps the first losses small (RetinaNet, arXiv
    1708.02002, section 3.3).
    """
    return -math.log((1 - probability) / probability)


def _centre_and_side(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    side = high - low
    # Rounded as the reference rounds it: which codes are exactly 0 depends on the last bit.
    return low + side / 2, side
