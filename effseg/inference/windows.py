"""One image in overlapping windows, with memory that does not grow with its height."""

# C channels, H W pixels of the image, h w pixels of a window, K classes

from collections.abc import Callable, Iterable, Iterator

import torch

from effseg.inference.protocol import window_starts

Forward = Callable[[list[torch.Tensor]], Iterable[tuple[int, torch.Tensor]]]
"""Windows (C, h, w) to (number of the window, its logits (K, h, w))."""

_PIXELS = {"cpu": 2 * 512 * 512}  # of the windows that run as a batch: on a CPU more win nothing
_PIXELS_ELSEWHERE = 8 * 512 * 512


def weighted_rows(
    image: torch.Tensor, size: int, forward: Forward
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Sum the logits of an image's windows and yield its rows as they are complete, from the top.

    A window counts most in its centre: its logits are weighted by a Gaussian with σ = an eighth of
    its side, as in nnU-Net (Isensee et al., Nature Methods 18, 2021). Only the sums of one row of
    windows are held.

    Args:
        image: (C, H, W), of which a side is longer than ``size``.
        size: side of a window, pixels; an image's shorter side may be less.
        forward: runs windows.

    Yields:
        The first row, and of the rows from there the weighted sums (K, rows, W) and the sums of the
        weights (rows, W), float32. They hold until the next ones are asked for.
    """
    height, width = image.shape[-2:]
    h, w = min(size, height), min(size, width)
    weight = _bell(h, image.device)[:, None] * _bell(w, image.device)
    tops, lefts = window_starts(height, size), window_starts(width, size)
    at_once = max(1, _PIXELS.get(image.device.type, _PIXELS_ELSEWHERE) // (h * w))
    sums = torch.empty(0)
    weights = torch.zeros((h, width), device=image.device)
    for top, below in zip(tops, [*tops[1:], height], strict=True):
        for first in range(0, len(lefts), at_once):
            part = lefts[first : first + at_once]
            windows = [image[:, top : top + h, x : x + w] for x in part]
            for index, logits in forward(windows):
                x = part[index]
                if not len(sums):
                    sums = torch.zeros((len(logits), h, width), device=logits.device)
                sums[:, :, x : x + w] += logits.float() * weight
                weights[:, x : x + w] += weight
        done = below - top
        yield top, sums[:, :done], weights[:done]
        for values in (sums, weights):
            rest = values[..., done:, :].clone()
            values[..., : h - done, :] = rest
            values[..., h - done :, :] = 0


def _bell(length: int, device: torch.device) -> torch.Tensor:
    """Return a Gaussian over ``length`` pixels, 1 in the middle, σ = length / 8."""
    x = torch.arange(length, device=device) - (length - 1) / 2
    return torch.exp(-32 * (x / length) ** 2)
