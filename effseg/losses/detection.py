"""The detection loss: anchor assignment, focal loss for classes, Huber loss for boxes."""

# B batch, A anchors, K classes, N most boxes of an image, M ignored boxes. Boxes are x1 y1 x2 y2
# in pixels.

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_area

from effseg.distributed import sum_over_processes
from effseg.errors import InputError
from effseg.models.boxes import encode

BACKGROUND = -1
IGNORED = -2
_OVERLAPS_AT_ONCE = 1 << 25
"""Anchor-box pairs computed at a time: 128 MB."""
_LARGE_LOGITS = 1 << 28
"""Bytes of class logits above which the loss is checkpointed: memory before speed."""


class Targets(NamedTuple):
    """The targets of every anchor."""

    labels: torch.Tensor
    """(B, A) int64: 0 … K-1, -1 background, -2 ignored."""
    codes: torch.Tensor
    """(B, A, 4) float32 as (ty, tx, th, tw); zero where there is no box."""


def assign(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    ignored: torch.Tensor | None = None,
    threshold: float = 0.5,
) -> Targets:
    """Assign boxes to anchors for a whole batch, without synchronising with the device.

    As in the reference (google/automl `anchors.py`), an anchor is matched to the box with the
    highest IoU if that is ≥ `threshold`, else it is background; the best anchor of every box is
    matched to that box whatever the IoU (to the first, if several boxes share it). Unmatched
    anchors with at least half their area in an ignored box (COCO's crowds) are ignored.

    Args:
        anchors: (A, 4).
        boxes: (B, N, 4), padded; N may be 0.
        labels: (B, N), 0 … K-1, negative for padding.
        ignored: (B, M, 4), padded with zeros; M may be 0. None: no ignored boxes.
        threshold: IoU from which an anchor is positive.
    """
    batch, max_boxes = labels.shape
    boxes = boxes.to(anchors)  # in another precision an anchor's code of itself is not exactly 0
    assigned = labels.new_full((batch, len(anchors)), BACKGROUND)
    codes = anchors.new_zeros(batch, len(anchors), 4)
    if max_boxes:
        step = max(1, _OVERLAPS_AT_ONCE // (max_boxes * len(anchors)))
        if anchors.device.type == "cpu":
            step = 1  # the overlaps of one image stay in the cache
        for i in range(0, batch, step):
            part = slice(i, i + step)
            match = _match(anchors, boxes[part], labels[part], threshold)
            positive = match < max_boxes
            match = torch.where(positive, match, 0)
            assigned[part] = torch.where(positive, labels[part].gather(1, match), BACKGROUND)
            matched = boxes[part].gather(1, match[..., None].expand(-1, -1, 4))
            codes[part] = encode(torch.where(positive[..., None], matched, anchors), anchors)
    if ignored is not None and ignored.shape[1]:
        share = (_overlap(ignored[..., None, :], anchors) / box_area(anchors)).amax(1)
        assigned = torch.where((assigned == BACKGROUND) & (share >= 0.5), IGNORED, assigned)
    return Targets(assigned, codes)


def _match(
    anchors: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Return the index of each anchor's box, (B, A) int64; N where there is none."""
    max_boxes = labels.shape[1]
    overlap = _overlap(boxes[..., None, :], anchors)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    iou = overlap / (area[..., None] + box_area(anchors) - overlap)
    iou = torch.where((labels >= 0)[..., None], iou, -1.0)
    best_iou, match = iou.max(1)  # (B, A)
    match = torch.where(best_iou >= threshold, match, max_boxes)
    top, best_anchor = iou.max(2)  # (B, N)
    number = torch.arange(max_boxes, device=match.device).expand_as(best_anchor)
    forced = torch.full_like(match, max_boxes).scatter_reduce(
        1, best_anchor, torch.where(top > 0, number, max_boxes), "amin"
    )
    return torch.where(forced < max_boxes, forced, match)


def _overlap(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the intersection area of boxes and anchors, both (…, 4), broadcast."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    ax1, ay1, ax2, ay2 = anchors.unbind(-1)
    width = (torch.minimum(x2, ax2) - torch.maximum(x1, ax1)).clamp_(min=0)
    height = (torch.minimum(y2, ay2) - torch.maximum(y1, ay1)).clamp_(min=0)
    return width.mul_(height)


def focal_sum(
    logits: torch.Tensor,
    labels: torch.Tensor,
    known: torch.Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 1.5,
) -> torch.Tensor:
    """Sum the focal loss over anchors and classes (arXiv 1708.02002, equation 5), in float32.

    A detector's logits are large (49,104 × 90 for one image of 512 pixels) and autograd keeps
    several tensors of that size. Above 256 MB they are recomputed in the backward pass, image by
    image, which takes longer. The sum is not divided by the number of positives.

    Args:
        logits: (B, A, K) float32.
        labels: (B, A) int64, see `Targets`.
        known: (B, K) bool, the classes annotated in each image. None: all.
        alpha: see `DetectionLoss`.
        gamma: see `DetectionLoss`.
    """
    if known is None:
        known = logits.new_ones(len(logits), logits.shape[2], dtype=torch.bool)
    of_image = partial(_focal_of_image, alpha=alpha, gamma=gamma)
    if logits.nbytes > _LARGE_LOGITS:
        of_image = partial(checkpoint, of_image, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([of_image(*part) for part in zip(logits, labels, known, strict=True)]).sum()


def _focal_of_image(
    logits: torch.Tensor, labels: torch.Tensor, known: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Sum the loss of one image: logits (A, K), labels (A,), known (K,)."""
    # Everything is computed as negative, then the positives (one in some hundred thousand) are
    # corrected: this needs no one-hot tensor.
    negative = _negative(logits, gamma)
    counted = (1 - alpha) * (labels != IGNORED).to(logits)
    total = counted @ (negative @ known.to(logits))  # no weighted copy of the large tensor
    column = labels.clamp(min=0)[:, None]
    as_negative = negative.gather(1, column)[:, 0] * known[column[:, 0]] * counted
    as_positive = alpha * _negative(-logits.gather(1, column)[:, 0], gamma)
    return total + torch.where(labels >= 0, as_positive - as_negative, 0.0).sum()


def _negative(logits: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return p^γ · -log(1 - p) for p = sigmoid(logits)."""
    cross_entropy = F.softplus(logits)
    return (gamma * (logits - cross_entropy)).exp() * cross_entropy


class DetectionLoss(nn.Module):
    """Focal loss + 50 × Huber loss, both divided by the number of positive anchors + 1.

    Positives are counted over all processes, so that the gradient averaged over processes equals
    that of one large batch. The reference (google/automl `train_lib.py`) counts per process.
    Everything is computed in float32, even under autocast.

    Box codes whose target is exactly 0 (same centre coordinate or side as the anchor) add no loss,
    as in the reference, which masks by non-zero targets. This happens in practice: crops cut boxes
    at their edge.

    Args:
        alpha: weight of positives; negatives have 1 - alpha.
        gamma: exponent of the focal factor (1 - p)^γ.
        delta: error from which the Huber loss is linear, in units of the box codes.
        box_weight: weight of the box loss.

    Raises:
        InputError: a value out of its range.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 1.5,
        delta: float = 0.1,
        box_weight: float = 50.0,
    ) -> None:
        """Check the parameters."""
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha={alpha}: expected 0 to 1")
        for name, value in (("gamma", gamma), ("box_weight", box_weight)):
            if value < 0:
                raise InputError(f"{name}={value}: expected at least 0")
        if delta <= 0:
            raise InputError(f"delta={delta}: expected more than 0")
        self.alpha, self.gamma, self.delta, self.box_weight = alpha, gamma, delta, box_weight

    def forward(
        self,
        class_logits: torch.Tensor,
        box_codes: torch.Tensor,
        targets: Targets,
        known: torch.Tensor | None = None,
        over_processes: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the total and its terms `class` and `box` (before `box_weight`).

        Args:
            class_logits: (B, A, K).
            box_codes: (B, A, 4) as (ty, tx, th, tw).
            targets: see `assign`.
            known: (B, K) bool, the classes annotated in each image; the others are ignored.
                None: all.
            over_processes: count positives over all processes, which then all have to call this.
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            positive = targets.labels >= 0
            total, world = positive.sum().float(), 1
            if over_processes:
                total, world = sum_over_processes(total)
            count = (total + 1.0) / world
            classes = focal_sum(class_logits.float(), targets.labels, known, self.alpha, self.gamma)
            classes = classes / count
            errors = F.huber_loss(
                box_codes.float(), targets.codes, reduction="none", delta=self.delta
            )
            counted = (targets.codes != 0) & positive[..., None]
            boxes = (errors * counted).sum() / (4.0 * count)
        return classes + self.box_weight * boxes, {"class": classes, "box": boxes}
