"""Logits to label maps, without ever holding all of them at full size."""

# K classes, H W pixels of a photo, h w cells of the logits.

import torch
import torch.nn.functional as F

_AT_ONCE = 1 << 26  # logits resized at a time, on any device: 256 MB
_IN_CACHE = 1 << 18  # on the CPU, where enlarging stays in the cache and argmax reads it there


def resize_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale logits (K, h, w) bilinearly to (K, H, W) float32, with half-pixel centres."""
    logits = logits.float()
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def label_map(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize logits (K, h, w) a few classes at a time; return the (H, W) uint8 label map."""
    if len(logits) == 1:
        return (resize_logits(logits, size)[0] > 0).to(torch.uint8)
    step = max(1, _AT_ONCE // (size[0] * size[1]))
    best: torch.Tensor | None = None
    labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), step):
        value, index = resize_logits(logits[first : first + step], size).max(0)
        label = index.add_(first).to(torch.uint8)
        if best is None:
            best, labels = value, label
        else:
            labels = torch.where(value > best, label, labels)
            best = torch.maximum(best, value)
    return labels


def coarse_label_map(coarse: torch.Tensor, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """Enlarge coarse logits in strips; return the label map of the photo.

    A strip is enlarged with a row of cells more above and below and loses them again: every value
    is the one that enlarging the whole gives.

    Args:
        coarse: (K, h, w) of a photo padded at its right and bottom.
        stride: pixels a cell, in both directions.
        size: (H, W) of the photo, at most stride · (h, w).

    Returns:
        (H, W) uint8; for K = 1, 1 where the logit is above 0.
    """
    height, width = size
    classes, cells = coarse.shape[:2]
    columns = min(coarse.shape[2], -(-width // stride) + 1)
    coarse = coarse[:, :, :columns].float()
    values = _IN_CACHE if coarse.device.type == "cpu" else _AT_ONCE
    rows = max(1, values // (classes * columns * stride**2))
    labels = torch.empty(size, dtype=torch.uint8, device=coarse.device)
    for top in range(0, -(-height // stride), rows):
        bottom = min(cells, top + rows)
        above, below = int(top > 0), int(bottom < cells)
        strip = coarse[None, :, top - above : bottom + below]
        large = F.interpolate(
            strip, scale_factor=float(stride), mode="bilinear", align_corners=False
        )[0]
        first = above * stride
        wanted = min(height, bottom * stride) - top * stride
        part = large[:, first : first + wanted, :width]
        found = part.argmax(0) if classes > 1 else part[0] > 0
        labels[top * stride : top * stride + wanted] = found
    return labels
