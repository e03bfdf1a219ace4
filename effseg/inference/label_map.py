"""Logits to label maps, without holding all of them at full size."""

# K classes, H W pixels of an image, h w cells of the logits.

import torch
import torch.nn.functional as F

_VALUES_AT_ONCE = 1 << 25  # logits at full size at a time: 128 MB


def resize_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale logits (K, h, w) bilinearly to (K, H, W) float32, with half-pixel centres."""
    logits = logits.float()
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def label_map(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale logits (K, h, w), K = 1 … 256, to (H, W); return the class of the largest, uint8.

    As many classes are scaled at a time as make 128 MB, at least one. At equal logits the first
    class wins; for K = 1 the label is 1 where the logit is above 0.
    """
    if len(logits) == 1:
        return (resize_logits(logits, size)[0] > 0).to(torch.uint8)
    step = max(1, _VALUES_AT_ONCE // (size[0] * size[1]))
    labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    best = torch.full(size, -torch.inf, device=logits.device)
    for first in range(0, len(logits), step):
        values = resize_logits(logits[first : first + step], size)
        if len(values) == 1:  # a large image: without torch.max's index of 8 bytes per pixel
            value = values[0]
            labels.masked_fill_(value > best, first)
        else:
            value, index = values.max(0)
            labels[:] = torch.where(value > best, index.add_(first).to(torch.uint8), labels)
        torch.maximum(best, value, out=best)
    return labels
