"""Raw outputs of the detector to boxes, scores and labels."""

# B batch, A anchors, K classes, N boxes, P candidates. Boxes are x1 y1 x2 y2 in pixels.

from collections.abc import Sequence
from typing import TypedDict

import torch
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from effseg.errors import InputError
from effseg.models.anchors import decode

CANDIDATES = 5000
"""Pairs of anchor and class that enter NMS, by score, over all levels (as in the reference)."""


class Detections(TypedDict):
    """What is found in one photo, as torchvision's detectors return it, best first."""

    boxes: torch.Tensor
    """(N, 4) float32, x1 y1 x2 y2 in pixels of the photo."""
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
    """Keep the best 5,000 pairs of anchor and class a photo, decode, clip, suppress.

    Suppression is per class, by torchvision's NMS, on the tensors' device.

    Args:
        class_logits: (B, A, K).
        box_codes: (B, A, 4).
        anchors: (A, 4).
        sizes: (H, W) of each photo without its padding; boxes are clipped to it.
        score_threshold: pairs that do not score more are dropped.
        iou_threshold: a box that overlaps a better one of its class by more is dropped.
        max_detections: boxes kept a photo.
        soft_nms_sigma: σ of Gaussian soft-NMS (arXiv 1704.04503), which lowers scores by
            exp(-IoU² / σ) in place of dropping; the paper's AP has 0.5. Slow: one round a kept box.

    Raises:
        InputError: a threshold outside 0 … 1, no detections wanted, or σ not positive.
    """
    for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name}={value}: expected 0 to 1")
    if max_detections < 1:
        raise InputError(f"max_detections={max_detections}: expected at least 1")
    if soft_nms_sigma is not None and soft_nms_sigma <= 0:
        raise InputError(f"soft_nms_sigma={soft_nms_sigma}: expected more than 0, or None")
    batch, _, classes = class_logits.shape
    flat = class_logits.reshape(batch, -1)
    logits, index = flat.topk(min(CANDIDATES, flat.shape[1]))  # (B, P), best first
    anchor, labels = index // classes, index % classes
    codes = box_codes.gather(1, anchor[..., None].expand(-1, -1, 4)).float()
    boxes = decode(codes, anchors[anchor])
    boxes = torch.stack(
        [clip_boxes_to_image(b, size) for b, size in zip(boxes, sizes, strict=True)]
    )
    scores = logits.float().sigmoid()
    found: list[Detections] = []
    # A photo at a time: torchvision tells classes apart by shifting their boxes, and shifts for a
    # whole batch would cost float32 its fractions of a pixel.
    for b, s, c in zip(boxes, scores, labels, strict=True):
        if soft_nms_sigma is not None:
            found.append(_soft(b, s, c, soft_nms_sigma, score_threshold, max_detections))
            continue
        wanted = s > score_threshold
        b, s, c = b[wanted], s[wanted], c[wanted]
        kept = batched_nms(b, s, c, iou_threshold)[:max_detections]
        found.append(Detections(boxes=b[kept], scores=s[kept], labels=c[kept]))
    return found


def _soft(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    sigma: float,
    score_threshold: float,
    max_detections: int,
) -> Detections:
    """Gaussian soft-NMS of one photo: a round picks the best box and lowers its neighbours."""
    left = scores.clone()
    picks: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for _ in range(min(max_detections, len(left))):
        best = left.argmax()
        picks.append(best)
        values.append(left[best])
        overlap = box_iou(boxes[best][None], boxes)[0] * (labels == labels[best])
        left = left * (-overlap.square() / sigma).exp()
        left[best] = -1.0
    if not picks:
        return Detections(boxes=boxes[:0], scores=scores[:0], labels=labels[:0])
    pick, value = torch.stack(picks), torch.stack(values)
    keep = value > score_threshold
    return Detections(boxes=boxes[pick[keep]], scores=value[keep], labels=labels[pick[keep]])
