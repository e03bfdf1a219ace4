"""Which anchor learns which box."""

# B batch, A anchors, N boxes of the fullest photo, M ignored boxes. Boxes are x1 y1 x2 y2 pixels.

from collections.abc import Sequence
from typing import NamedTuple

import torch

from effseg.models.anchors import encode

BACKGROUND = -1
IGNORED = -2
_AT_ONCE = 1 << 25  # overlaps computed at a time: 128 MB
_IN_CACHE = 1 << 18  # the same on a CPU, 1 MB


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
    cells: Sequence[tuple[int, int]] | None = None,
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
        cells: (rows, columns) of each level where the anchors are those of
            :func:`effseg.models.anchors.make_anchors`. On the CPU a box then looks at the anchors
            near it only, with the same result; a GPU would have to be waited for.
    """
    batch, most = labels.shape
    names = labels.new_full((batch, len(anchors)), BACKGROUND)
    codes = anchors.new_zeros(batch, len(anchors), 4)
    if most:
        if cells is not None and anchors.device.type == "cpu" and threshold >= 0.5:
            match = _match_near(anchors, boxes, labels, threshold, cells)
        else:
            at_once = _IN_CACHE if anchors.device.type == "cpu" else _AT_ONCE
            step = max(1, at_once // (most * len(anchors)))
            parts = [slice(i, i + step) for i in range(0, batch, step)]
            match = torch.cat([_match(anchors, boxes[p], labels[p], threshold) for p in parts])
        names, codes = _fill(anchors, boxes, labels, match)
    if ignored is not None:
        share = (_overlap(ignored[..., None, :], anchors) / _area(anchors)).amax(1)
        names = torch.where((names == BACKGROUND) & (share >= 0.5), IGNORED, names)
    return Targets(names, codes)


def _match(
    anchors: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Return which box each anchor takes, (B, A) int64, N for none: every box, every anchor."""
    most = labels.shape[1]
    iou = _iou(boxes[..., None, :], anchors)
    iou = torch.where((labels >= 0)[..., None], iou, -1.0)
    best_iou, match = iou.max(1)  # (B, A)
    match = torch.where(best_iou >= threshold, match, most)
    top, best_anchor = iou.max(2)  # (B, N)
    return _force(match, best_anchor, top > 0)


def _match_near(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    threshold: float,
    cells: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Return what :func:`_match` returns.

    IoU ≥ t needs areas that differ by a factor of 1/t at most, and (for t ≥ ½) centres that lie
    within half of the anchor's side of each other: of each level a window of cells around a box
    that fits it. A box that nothing overlaps so much is compared with all anchors.
    """
    batch, most = labels.shape
    count = len(anchors)
    valid = (labels >= 0).flatten()
    flat = boxes.reshape(-1, 4)
    area = _area(flat)
    centre = (flat[:, :2] + flat[:, 2:]) / 2
    shapes = count // sum(rows * columns for rows, columns in cells)
    hits: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    first = 0
    for rows, columns in cells:
        own = anchors[first : first + shapes]
        cell = own[0, :2] + own[0, 2:]  # twice the first cell's centre
        areas = _area(own)
        fits = valid & (area >= 0.99 * threshold * areas.min())
        fits &= area <= 1.01 * areas.max() / threshold
        some = fits.nonzero()[:, 0]
        reach = ((own[:, 2:] - own[:, :2]).amax(0) / cell / 2).ceil().long().tolist()
        middle = (centre[some] / cell).floor().long()
        x = _window(middle[:, 0], reach[0], columns)[:, None, :, None]
        y = _window(middle[:, 1], reach[1], rows)[:, :, None, None]
        near = (first + (y * columns + x) * shapes + torch.arange(shapes)).flatten(1)
        iou = _iou(flat[some][:, None], anchors[near])
        box, place = (iou >= threshold).nonzero().unbind(1)
        hits.append((some[box], near[box, place], iou[box, place]))
        first += rows * columns * shapes
    box, anchor, iou = (torch.cat(parts) for parts in zip(*hits, strict=True))
    # Of the boxes over an anchor the one with the largest IoU, of equal ones the first.
    key = box // most * count + anchor
    best = iou.new_zeros(batch * count).scatter_reduce(0, key, iou, "amax")
    wins = iou == best[key]
    match = torch.full((batch * count,), most)
    match = match.scatter_reduce(0, key[wins], box[wins] % most, "amin").view(batch, count)
    # Of the anchors over a box likewise.
    top = iou.new_zeros(batch * most).scatter_reduce(0, box, iou, "amax")
    wins = iou == top[box]
    best_anchor = torch.full((batch * most,), count)
    best_anchor = best_anchor.scatter_reduce(0, box[wins], anchor[wins], "amin")
    for part in (valid & (top == 0)).nonzero()[:, 0].split(max(1, _IN_CACHE // count)):
        top[part], best_anchor[part] = _iou(flat[part][:, None], anchors).max(1)
    found = top > 0
    best_anchor = torch.where(found, best_anchor, 0)
    return _force(match, best_anchor.view(batch, most), found.view(batch, most))


def _window(middle: torch.Tensor, reach: int, cells: int) -> torch.Tensor:
    """Return the cells (M, span) within ``reach`` of the middle ones, moved into 0 … cells - 1."""
    span = min(cells, 2 * reach + 1)
    return (middle - reach).clamp(0, cells - span)[:, None] + torch.arange(span)


def _force(match: torch.Tensor, best_anchor: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Give every box its best anchor, of boxes that share it the first; in (B, A), out (B, A)."""
    most = best_anchor.shape[1]
    number = torch.arange(most, device=match.device).expand_as(best_anchor)
    forced = torch.full_like(match, most).scatter_reduce(
        1, best_anchor, torch.where(found, number, most), "amin"
    )
    return torch.where(forced < most, forced, match)


def _fill(
    anchors: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, match: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels (B, A) and codes (B, A, 4) of what each anchor takes."""
    positive = match < labels.shape[1]
    if match.device.type == "cpu":  # one anchor in a thousand
        names = torch.full_like(match, BACKGROUND)
        codes = anchors.new_zeros(*match.shape, 4)
        photo, anchor = positive.nonzero().unbind(1)
        taken = match[photo, anchor]
        names[photo, anchor] = labels[photo, taken]
        codes[photo, anchor] = encode(boxes[photo, taken], anchors[anchor])
        return names, codes
    match = torch.where(positive, match, 0)
    names = torch.where(positive, labels.gather(1, match), BACKGROUND)
    matched = boxes.gather(1, match[..., None].expand(-1, -1, 4))
    return names, encode(torch.where(positive[..., None], matched, anchors), anchors)


def _iou(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the IoU of boxes and anchors, both (…, 4) and broadcast."""
    inter = _overlap(boxes, anchors)
    return inter / (_area(boxes) + _area(anchors) - inter)


def _overlap(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    ax1, ay1, ax2, ay2 = anchors.unbind(-1)
    width = (torch.minimum(x2, ax2) - torch.maximum(x1, ax1)).clamp_(min=0)
    height = (torch.minimum(y2, ay2) - torch.maximum(y1, ay1)).clamp_(min=0)
    return width.mul_(height)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
