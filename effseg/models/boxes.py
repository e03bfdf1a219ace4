"""Boxes: anchors, box codes, and non-maximum suppression."""

# B batch, A anchors, K classes, N boxes, P candidates, H W pixels. Boxes are x1 y1 x2 y2 in pixels,
# codes (ty, tx, th, tw).

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypedDict

import torch
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from effseg.errors import InputError

PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)
"""Bias for which a sigmoid gives 0.01: almost all anchors are background, and so the first losses
are small (RetinaNet, arXiv 1708.02002, section 3.3)."""
OCTAVES = 3
"""Anchor sizes per level: the base size times 2^(0/3), 2^(1/3), 2^(2/3)."""
ANCHOR_SHAPES: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
"""(width, height) factors of an anchor: ratios 1, 2 and ½. The published weights were trained with
these rounded values; √2 and √½ differ by 1 %."""

CANDIDATES = 5000
"""Best-scored (anchor, class) pairs of all levels that enter NMS, as in the reference."""

_TINY = 1e-7


def check_shapes(shapes: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Return the (width, height) factors of anchors as tuples.

    Raises:
        InputError: there is none, or one that is not two numbers above 0.
    """
    try:
        pairs = tuple((float(width), float(height)) for width, height in shapes)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or min(map(min, pairs)) <= 0:
        raise InputError(f"anchor_shapes={shapes!r}: expected pairs (width, height) above 0")
    return pairs


def level_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    """Return (rows, columns) of a level: the image's sides over 2^level, rounded up."""
    cell = 2**level  # no division of negative numbers, which ONNX rounds differently
    return (size[0] + cell - 1) // cell, (size[1] + cell - 1) // cell


@lru_cache(maxsize=32)
def make_anchors(
    size: tuple[int, int],
    levels: tuple[int, int] = (3, 7),
    scale: float = 4.0,
    shapes: tuple[tuple[float, float], ...] = ANCHOR_SHAPES,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the anchors of an image: levels from fine to coarse, then rows, columns.

    Each cell has 9: octaves (outer) by shapes (inner). Their base side is `scale` times the
    cell's. A cell's side is the image's divided by the number of cells, as in the reference
    (google/automl `anchors.py`): at 320 pixels P7 has 3 cells of 106.7 pixels. The anchors of the
    last 32 sizes are cached: do not write to them.

    Args:
        size: (H, W) of the network's input, padding included.
        levels: finest and coarsest level.
        scale: base side in cells; 4 in the paper.
        shapes: (width, height) factors.
        device: device of the result.

    Returns:
        (A, 4) float32, x1 y1 x2 y2 in pixels; they may extend beyond the image.

    Examples:
        >>> make_anchors((512, 512)).shape
        torch.Size([49104, 4])
    """
    with torch.inference_mode(False):  # cached tensors are used in training too
        return lay_anchors(size, levels, scale, shapes).to(device)


def lay_anchors(
    size: tuple[int, int],
    levels: tuple[int, int],
    scale: float,
    shapes: tuple[tuple[float, float], ...],
) -> torch.Tensor:
    """Compute the anchors of `make_anchors` without cache; H and W may be symbolic (export)."""
    octaves = [2 ** (octave / OCTAVES) for octave in range(OCTAVES)]
    sides = torch.tensor(
        [(width * by, height * by) for by in octaves for width, height in shapes],
        dtype=torch.float64,
    )
    anchors = []
    for level in range(levels[0], levels[1] + 1):
        rows, columns = level_size(size, level)
        height, width = size[0] / rows, size[1] / columns
        y = (torch.arange(rows, dtype=torch.float64) + 0.5) * height
        x = (torch.arange(columns, dtype=torch.float64) + 0.5) * width
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
        half = torch.stack([sides[:, 0] * width, sides[:, 1] * height], -1) * scale / 2
        anchors.append(torch.cat([centres - half, centres + half], -1).reshape(-1, 4))
    return torch.cat(anchors).float()


def encode(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the codes of boxes relative to anchors, both (…, 4) and broadcast.

    ty = (y - ya) / ha and th = log(h / ha) with centres y and heights h, likewise tx and tw; no
    variance factors.
    """
    centre, side = _centre_and_side(boxes)
    centre_a, side_a = _centre_and_side(anchors)
    side, side_a = side + _TINY, side_a + _TINY
    shift = (centre - centre_a) / side_a
    stretch = (side / side_a).log()
    return torch.stack([shift[..., 1], shift[..., 0], stretch[..., 1], stretch[..., 0]], -1)


def decode(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Decode codes (…, 4) relative to anchors (…, 4) to boxes: the inverse of `encode`.

    Examples:
        >>> anchors = torch.tensor([[0.0, 0.0, 8.0, 16.0]])
        >>> decode(encode(anchors + 1, anchors), anchors)
        tensor([[ 1.,  1.,  9., 17.]])
    """
    centre_a, side_a = _centre_and_side(anchors)
    ty, tx, th, tw = codes.unbind(-1)
    centre = torch.stack([tx, ty], -1) * side_a + centre_a
    half = torch.stack([tw, th], -1).exp() * side_a / 2
    return torch.cat([centre - half, centre + half], -1)


def _centre_and_side(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    side = high - low
    # Rounded as in the reference: which codes are exactly 0 depends on the last bit.
    return low + side / 2, side


class Detections(TypedDict):
    """Detections in one image in torchvision's format, best first."""

    boxes: torch.Tensor
    """(N, 4) float32, x1 y1 x2 y2 in pixels of the image."""
    scores: torch.Tensor
    """(N,) float32, 0 … 1."""
    labels: torch.Tensor
    """(N,) int64, 0 … K-1."""


def postprocess(
    class_logits: torch.Tensor,
    box_codes: torch.Tensor,
    anchors: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.0,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    soft_nms_sigma: float | None = None,
) -> list[Detections]:
    """Decode and clip the best 5,000 (anchor, class) pairs per image, then run NMS per class.

    NMS is torchvision's and runs on the tensors' device.

    Args:
        class_logits: (B, A, K).
        box_codes: (B, A, 4).
        anchors: (A, 4).
        sizes: (H, W) of each image without padding, to which boxes are clipped.
        score_threshold: only pairs with a higher score are kept.
        iou_threshold: boxes with a higher IoU with a better box of their class are dropped.
        max_detections: maximum number of boxes per image.
        soft_nms_sigma: σ of Gaussian soft-NMS (arXiv 1704.04503), which multiplies scores by
            exp(-IoU² / σ) instead of dropping boxes; the paper's AP uses 0.5. Slow: one iteration
            per kept box.

    Raises:
        InputError: a threshold outside 0 … 1, fewer than one detection, or σ not positive.
    """
    logits, anchor, labels = best_pairs(class_logits)
    codes = box_codes.gather(1, anchor[..., None].expand(-1, -1, 4)).float()
    boxes = decode(codes, anchors[anchor])
    thresholds = (score_threshold, iou_threshold, max_detections, soft_nms_sigma)
    return suppress(boxes, logits.float().sigmoid(), labels, sizes, *thresholds)


def best_pairs(class_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, anchors and classes, (B, P) each, of the best P = 5,000 pairs, best first."""
    batch, _, classes = class_logits.shape
    flat = class_logits.reshape(batch, -1)
    logits, index = flat.topk(min(CANDIDATES, flat.shape[1]))
    return logits, index // classes, index % classes


def suppress(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    soft_nms_sigma: float | None,
) -> list[Detections]:
    """Clip candidates (B, P, 4), (B, P), (B, P) to their images and run NMS, see `postprocess`."""
    for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name}={value}: expected 0 to 1")
    if max_detections < 1:
        raise InputError(f"max_detections={max_detections}: expected at least 1")
    if soft_nms_sigma is not None and soft_nms_sigma <= 0:
        raise InputError(f"soft_nms_sigma={soft_nms_sigma}: expected more than 0, or None")
    boxes = torch.stack(
        [clip_boxes_to_image(b, size) for b, size in zip(boxes, sizes, strict=True)]
    )
    results: list[Detections] = []
    # One image at a time: torchvision separates classes by offsets, and offsets for a whole batch
    # would cost float32 its sub-pixel precision.
    for b, s, c in zip(boxes, scores, labels, strict=True):
        if soft_nms_sigma is not None:
            results.append(_soft(b, s, c, soft_nms_sigma, score_threshold, max_detections))
            continue
        scored = s > score_threshold
        b, s, c = b[scored], s[scored], c[scored]
        kept = batched_nms(b, s, c, iou_threshold)[:max_detections]
        results.append(Detections(boxes=b[kept], scores=s[kept], labels=c[kept]))
    return results


def _soft(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    sigma: float,
    score_threshold: float,
    max_detections: int,
) -> Detections:
    """Gaussian soft-NMS of one image: each iteration picks the best box and lowers the others."""
    count = min(max_detections, len(scores))
    picks, values = labels.new_zeros(count), scores.new_zeros(count)
    for i in range(count):
        values[i], picks[i] = scores.max(0)
        best = picks[i]
        # nan between two boxes without an area, which is what clipping leaves in the padding.
        overlap = box_iou(boxes[best][None], boxes)[0].nan_to_num(0.0) * (labels == labels[best])
        scores = scores * (-overlap.square() / sigma).exp()
        scores[best] = -1.0
    keep = values > score_threshold
    picks = picks[keep]
    return Detections(boxes=boxes[picks], scores=values[keep], labels=labels[picks])
