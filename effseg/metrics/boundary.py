"""Boundary IoU: how well contours agree, independent of object size."""

# B images, K classes, H W pixels, d pixels from the contour

import math
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torchmetrics.utilities import rank_zero_warn

from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError
from effseg.metrics.confusion import (
    DatasetMetric,
    as_labels,
    class_iou,
    confusion_counts,
    require_finite,
)

DILATION_RATIO = 0.02


def boundary_counts(
    labels: torch.Tensor,
    target: torch.Tensor,
    num_classes: int = 21,
    ignore_index: int | None = IGNORE_INDEX,
    dilation_ratio: float = DILATION_RATIO,
) -> torch.Tensor:
    """Count the pixels of one image's boundary regions.

    A class's boundary region is its mask minus the mask eroded d times by a 3x3 kernel, padded with
    background. A pixel survives that erosion exactly if the (2d+1)x(2d+1) window around it holds a
    single label, so one minimum and one maximum filter handle all classes at once.

    `labels` and `target` are (H, W) of any integer dtype on the CPU, 0 … K-1 where counted.
    Returns (2, K) int64: intersection and union of the true and the predicted region.
    """
    height, width = target.shape
    distance = max(1, round(dilation_ratio * math.hypot(height, width)))
    # K means "no class": ignored pixels, and everything outside the image.
    dtype = np.dtype(np.uint8 if num_classes < 256 else np.uint16)
    box = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    truth, predicted = target.long().numpy(), labels.long().numpy()
    counted = np.True_ if ignore_index is None else truth != ignore_index
    regions = []
    for values in (truth, predicted):
        mask = np.where(counted, values, num_classes).astype(dtype)
        low, high = (
            extreme(mask, box, borderType=cv2.BORDER_CONSTANT, borderValue=(num_classes,))
            for extreme in (cv2.erode, cv2.dilate)
        )
        regions.append(np.where(low == high, num_classes, mask))
    shared = regions[0][regions[0] == regions[1]]
    intersection, in_truth, in_prediction = (
        np.bincount(region.reshape(-1), minlength=num_classes + 1)[:num_classes]
        for region in (shared, *regions)
    )
    union = in_truth + in_prediction - intersection
    return torch.from_numpy(np.stack([intersection, union]).astype(np.int64))


def boundary_scores(counts: torch.Tensor, ignore_index: int | None) -> dict[str, torch.Tensor]:
    """Turn (2, K) summed intersections and unions into `boundary_iou` and `iou` (K,), float64.

    `iou` is nan for classes without a boundary, and for an `ignore_index` in 0 … K-1.
    """
    if counts.device.type == "mps":  # which has no float64
        counts = counts.cpu()
    intersection, union = counts.to(torch.float64)
    iou = class_iou(intersection, union, ignore_index)
    return {"boundary_iou": iou.nanmean(), "iou": iou}


class BoundaryIoU(DatasetMetric):
    """Boundary IoU over a dataset (Cheng et al. 2021, arXiv 2103.16562, equation 2).

    Per class, intersection and union of the true and the predicted boundary region (the pixels of
    the mask within d of its contour) are summed over all images and processes and divided once. The
    mean is over classes with a non-empty union, without an `ignore_index` in 0 … K-1.

    Ignored pixels, which the paper does not have, are removed from both masks first: predictions
    there have no effect, and a prediction that is correct on all other pixels scores 1. The filters
    run on the CPU. If no class has a boundary, `compute` warns and returns nan.

    Args:
        num_classes: K, background included.
        ignore_index: true label of ignored pixels, or None.
        dilation_ratio: d as a fraction of the image's diagonal; d is at least one pixel.

    Raises:
        InputError: `num_classes` is less than 1 or `dilation_ratio` is not positive.
    """

    dimensions: ClassVar[dict[str, int]] = {"iou": 1}
    counts: torch.Tensor

    def __init__(
        self,
        num_classes: int = 21,
        ignore_index: int | None = IGNORE_INDEX,
        dilation_ratio: float = DILATION_RATIO,
        **kwargs: Any,
    ) -> None:
        """Start from zero counts; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(num_classes, ignore_index, dilation_ratio, **kwargs)
        if not dilation_ratio > 0:
            raise InputError(f"dilation_ratio is {dilation_ratio}: expected more than 0")
        self.ignore_index = ignore_index
        self.dilation_ratio = dilation_ratio
        counts = torch.zeros(2, num_classes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add one image or one batch; arguments and errors as `SegmentationMetrics.update`."""
        require_finite(preds)
        labels, target = (each.cpu() for each in as_labels(preds, target, self.num_classes))
        confusion_counts(labels, target, self.num_classes, self.ignore_index)  # checks the values
        if target.ndim == 2:
            labels, target = labels[None], target[None]
        options = (self.num_classes, self.ignore_index, self.dilation_ratio)
        for predicted, truth in zip(labels, target, strict=True):
            if truth.numel():
                self.counts += boundary_counts(predicted, truth, *options).to(self.counts)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return `boundary_iou` (0-dim) and `iou` (K,) of everything since the last reset."""
        if not self.counts.any():
            rank_zero_warn("BoundaryIoU: no pixel was counted, so every score is nan")
        return boundary_scores(self.counts, self.ignore_index)
