"""Which anchor learns which box."""

# B batch, A anchors, N boxes of the fullest photo, M ignored boxes. Boxes are x1 y1 x2 y2 pixels.

from collections.abc import Sequence
from typing import NamedTuple

import torch

from effseg.models.anchors import encode

BACKGROUND = -1
IGNORED = -2
_AT_ONCE = 1 << 25  # overlaps computed at a time: 128 MB


class Targets(NamedTuple):
    """What the detector should say at every anchor."""

    labels: torch.Tensor
    """(B, A) int64: 0 … K-1, -1 background, -2 counts nowhere."""
    codes: torch.Tensor
    """(B, A, 4) float32 as (ty, tx, th, tw); zero where there is no box."""


def pad_boxes(
    boxes: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the boxes of photos side by side: (B, N, 4), and (B, N) with -1 in the empty places.

    Args:
        boxes: a (n, 4) tensor a photo; n may be 0.
        labels: a (n,) tensor a photo.
    """
    most = max((len(b) for b in boxes), default=0)
    padded = boxes[0].new_zeros(len(boxes), most, 4)
    names = labels[0].new_full((len(boxes), most), -1)
    for row, name, b, label in zip(padded, names, boxes, labels, strict=True):
        row[: len(b)] = b
        name[: len(b)] = label
    return padded, names


def assign(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    ignored: torch.Tensor | None = None,
    threshold: float = 0.5,
) -> Targets:
    """Assign boxes to anchors, all photos of a batch at once.

    An anchor takes the box that it overlaps most, if IoU ≥ ``threshold``, otherwise background; the
    best anchor of every box takes that box whatever the IoU (of boxes that share it, the first).
    So the reference (google/automl ``anchors.py``). Anchors that lie by half or more in an ignored
    box (COCO's crowds) and take no box count nowhere.

    Args:
        anchors: (A, 4).
        boxes: (B, N, 4), padded; N may be 0.
        labels: (B, N), 0 … K-1, negative in padding.
        ignored: (B, M, 4), padded with zeros; None: there are none.
        threshold: IoU from which an anchor is positive.
    """
    batch, most = labels.shape
    per_photo = max(1, most) * len(anchors)
    step = max(1, _AT_ONCE // per_photo)
    found = [
        _assign(
            anchors,
            boxes[i : i + step],
            labels[i : i + step],
            None if ignored is None else ignored[i : i + step],
            threshold,
        )
        for i in range(0, batch, step)
    ]
    return Targets(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _assign(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    ignored: torch.Tensor | None,
    threshold: float,
) -> Targets:
    batch, most = labels.shape
    count = len(anchors)
    if most == 0:
        names = labels.new_full((batch, count), BACKGROUND)
        codes = anchors.new_zeros(batch, count, 4)
    else:
        inter = _intersection(boxes, anchors)
        iou = inter / (_area(boxes)[..., None] + _area(anchors) - inter)
        iou = torch.where((labels >= 0)[..., None], iou, -1.0)
        best_iou, match = iou.max(1)  # (B, A)
        top, best_anchor = iou.max(2)  # (B, N)
        number = torch.arange(most, device=labels.device).expand(batch, -1)
        forced = torch.full((batch, count), most, device=labels.device).scatter_reduce(
            1, best_anchor, torch.where(top > 0, number, most), "amin"
        )
        positive = (best_iou >= threshold) | (forced < most)
        match = torch.where(forced < most, forced, match)
        names = torch.where(positive, labels.gather(1, match), BACKGROUND)
        matched = boxes.gather(1, match[..., None].expand(-1, -1, 4))
        matched = torch.where(positive[..., None], matched, anchors)
        codes = encode(matched, anchors)
    if ignored is not None:
        share = (_intersection(ignored, anchors) / _area(anchors)).amax(1)
        names = torch.where((names == BACKGROUND) & (share >= 0.5), IGNORED, names)
    return Targets(names, codes)


def _intersection(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the common area (B, N, A) of boxes (B, N, 4) and anchors (A, 4)."""
    x1, y1, x2, y2 = (edge[..., None] for edge in boxes.unbind(-1))
    ax1, ay1, ax2, ay2 = anchors.unbind(-1)
    width = (torch.minimum(x2, ax2) - torch.maximum(x1, ax1)).clamp_(min=0)
    height = (torch.minimum(y2, ay2) - torch.maximum(y1, ay1)).clamp_(min=0)
    return width.mul_(height)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
