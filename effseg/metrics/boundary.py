"""Boundary IoU: how well contours agree, whatever the size of the objects."""

# B images, K classes, H W pixels, d pixels from the contour

import math
from typing import Any

import cv2
import numpy as np
import torch
from torchmetrics import Metric

from effseg.data.samples import IGNORE_INDEX
from effseg.errors import InputError
from effseg.metrics.segmentation import as_labels, describe_unknown, find_unknown
from effseg.metrics.tally import tally

DILATION_RATIO = 0.02


def boundary_counts(
    labels: torch.Tensor,
    target: torch.Tensor,
    num_classes: int = 21,
    ignore_index: int | None = IGNORE_INDEX,
    dilation_ratio: float = DILATION_RATIO,
) -> torch.Tensor:
    """Count the pixels of one image's boundary regions.

    A class's boundary region is its mask without the mask's erosion by d steps of 3x3, nothing
    lying outside the image. A pixel survives that erosion exactly if the (2d+1)x(2d+1) box around
    it holds one label only, so a minimum and a maximum filter serve all classes at once.

    Args:
        labels: (H, W) predicted labels, any integer dtype.
        target: (H, W) true labels, any integer dtype.
        num_classes: K.
        ignore_index: true label of the pixels that count nowhere.
        dilation_ratio: d = max(1, round(dilation_ratio x image diagonal)).

    Returns:
        (2, K) int64 on the CPU: intersection and union of the true and the predicted region.

    Raises:
        InputError: a counted value outside 0 … K-1.
    """
    labels, target = labels.cpu(), target.cpu()
    table = tally(labels, target, num_classes, ignore_index)
    if bool(table[-1].any() | table[:, -1].any()):
        unknown = find_unknown(labels, target, num_classes, ignore_index)
        raise InputError(describe_unknown(unknown, num_classes, ignore_index))
    height, width = target.shape
    distance = max(1, round(dilation_ratio * math.hypot(height, width)))
    # K stands for "no class": ignored pixels and what lies outside the image.
    dtype = np.uint8 if num_classes < 256 else np.uint16
    truth, predicted = (value.long().numpy() for value in (target, labels))
    ignored = np.zeros(truth.shape, bool) if ignore_index is None else truth == ignore_index
    true_region, predicted_region = (
        _keep_boundary(np.where(ignored, num_classes, value).astype(dtype), distance, num_classes)
        for value in (truth, predicted)
    )
    shared = true_region[true_region == predicted_region]
    intersection, in_truth, in_prediction = (
        np.bincount(region.reshape(-1), minlength=num_classes + 1)[:num_classes]
        for region in (shared, true_region, predicted_region)
    )
    union = in_truth + in_prediction - intersection
    return torch.from_numpy(np.stack([intersection, union]).astype(np.int64))


def _keep_boundary(
    mask: np.ndarray[Any, Any], distance: int, no_class: int
) -> np.ndarray[Any, Any]:
    """Set every pixel farther than ``distance`` from its own class's contour to ``no_class``."""
    if not mask.size:
        return mask
    box = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    low, high = (
        operation(mask, box, borderType=cv2.BORDER_CONSTANT, borderValue=(no_class,))
        for operation in (cv2.erode, cv2.dilate)
    )
    region: np.ndarray[Any, Any] = np.where(low == high, no_class, mask)
    return region


def boundary_scores(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Turn (2, K) summed intersections and unions into ``boundary_iou`` and ``iou`` (K,)."""
    if counts.device.type == "mps":
        counts = counts.cpu()
    intersection, union = counts.to(torch.float64)
    iou = intersection / union
    return {"boundary_iou": iou.nanmean(), "iou": iou}


class BoundaryIoU(Metric):
    """Boundary IoU over a data set (Cheng et al. 2021, arXiv 2103.16562, equation 2).

    Per class, intersection and union of the true and the predicted boundary region (the pixels of
    the mask within d of its contour, see `boundary_counts`) are summed over all images and
    processes and divided once. The mean is over classes whose union is not empty.

    Ignored pixels are taken out of the true and the predicted mask before the contours are looked
    for, so what is predicted there changes nothing, and a prediction that is right on every counted
    pixel scores 1. The paper has no ignored pixels. The filters run on the CPU.

    Args:
        num_classes: K, background included.
        ignore_index: true label of the pixels that count nowhere, or None.
        dilation_ratio: d as a share of the image's diagonal; d is at least one pixel.

    Raises:
        InputError: ``num_classes`` is less than 1 or ``dilation_ratio`` is not positive.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: torch.Tensor

    def __init__(
        self,
        num_classes: int = 21,
        ignore_index: int | None = IGNORE_INDEX,
        dilation_ratio: float = DILATION_RATIO,
        **kwargs: Any,
    ) -> None:
        """Start from zero counts; ``kwargs`` are those of ``torchmetrics.Metric``."""
        super().__init__(**kwargs)
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}: expected at least 1")
        if not dilation_ratio > 0:
            raise InputError(f"dilation_ratio is {dilation_ratio}: expected more than 0")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.dilation_ratio = dilation_ratio
        self.add_state(
            "counts", torch.zeros(2, num_classes, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add one image or one batch.

        Args:
            preds: (B, K, H, W) floating-point logits, or (B, H, W) or (H, W) integer labels.
            target: (B, H, W) or (H, W) integer labels.

        Raises:
            InputError: shapes that do not fit, or a counted value outside 0 … K-1.
        """
        labels, target = as_labels(preds, target, self.num_classes)
        if target.ndim == 2:
            labels, target = labels[None], target[None]
        found = [
            boundary_counts(
                predicted, truth, self.num_classes, self.ignore_index, self.dilation_ratio
            )
            for predicted, truth in zip(labels, target, strict=True)
        ]
        self.counts += sum(found, torch.zeros_like(self.counts, device="cpu")).to(self.counts)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return ``boundary_iou`` (0-dim) and ``iou`` (K,), float64, nan where nothing counts."""
        return boundary_scores(self.counts)
