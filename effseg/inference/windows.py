"""One image in overlapping windows; memory hardly grows with the image."""

# C channels, H W pixels of the image, h w pixels of a window, K classes

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

from effseg.inference.protocol import window_starts

Forward = Callable[[list[torch.Tensor]], Iterable[tuple[int, torch.Tensor]]]
"""Maps windows (C, h, w) to (index of the window, its logits (K, h, w))."""

# Pixels per batch of windows: on a CPU more windows at once gain nothing and take memory.
_CPU_PIXELS, _GPU_PIXELS = 512 * 512, 8 * 512 * 512


def weighted_blocks(
    image: torch.Tensor, size: int, forward: Forward
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Sum the logits of an image's windows; yield blocks as they become complete, row by row.

    Logits are weighted by a Gaussian around the window's centre with σ = 1/8 of its side, as in
    nnU-Net (Isensee et al., Nature Methods 18, 2021). Only the sums of one window
    and of the rows that the next windows overlap are held. The image (C, H, W) has a side longer
    than `size`, a window's; the other may be shorter.

    Yields:
        Rows and columns of a block, its weighted sums (K, h, w) and the sums of the weights (h, w),
        float32. Valid until the next block is requested.
    """
    height, width = image.shape[-2:]
    h, w = min(size, height), min(size, width)
    tops, lefts = window_starts(height, size), window_starts(width, size)
    down, across = (
        torch.signal.windows.gaussian(side, std=side / 8, device=image.device) for side in (h, w)
    )
    rows, columns = _totals(tops, down, height), _totals(lefts, across, width)
    pixels = _CPU_PIXELS if image.device.type == "cpu" else _GPU_PIXELS
    at_once = max(1, pixels // (h * w))
    # (K, rows, W): sums of the row of windows above where this row overlaps it; each column is
    # replaced by this row's as soon as it has been read.
    shared = torch.empty(0)
    overlap = 0
    for top, below in zip(tops, [*tops[1:], height], strict=True):
        done = slice(top, below)
        kept = top + h - below
        block = torch.empty(0)
        for first in range(0, len(lefts), at_once):
            part = lefts[first : first + at_once]
            windows = [image[:, top : top + h, x : x + w] for x in part]
            for number, logits in forward(windows):
                x = part[number]
                right = lefts[first + number + 1] if first + number + 1 < len(lefts) else width
                weighted = logits.float() * (down[:, None] * across)
                if len(block):  # columns shared with the last window
                    weighted[..., : block.shape[-1]] += block
                fresh = slice(x + (block.shape[-1] if len(block) else 0), x + w)
                if not len(shared):
                    most = max((a + h - b for a, b in itertools.pairwise(tops)), default=0)
                    shared = weighted.new_zeros((len(logits), most, width))
                weighted[:, :overlap, fresh.start - x :] += shared[:, :overlap, fresh]
                columns_done = slice(x, right)
                complete = weighted[..., : right - x]
                if below < height:
                    shared[:, :kept, columns_done] = complete[:, below - top :]
                total = rows[done, None] * columns[columns_done]
                yield done, columns_done, complete[:, : below - top], total
                block = weighted[..., right - x :].clone()
        overlap = kept


def _totals(starts: list[int], bell: torch.Tensor, length: int) -> torch.Tensor:
    """Return the sums of the windows' weights along a side."""
    total = bell.new_zeros(length)
    for start in starts:
        total[start : start + len(bell)] += bell
    return total
