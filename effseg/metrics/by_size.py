"""IoU by object size."""

# H W pixels, K classes

from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt
import torch

from effseg.data.sample import IGNORE_INDEX
from effseg.metrics.confusion import DatasetMetric

Mask = npt.NDArray[np.bool_]
SIZES = ("small", "medium", "large")
LIMITS = (32**2, 96**2)
"""COCO's limits in pixels: small is below the first, large is from the second on."""


class SizeIoU(DatasetMetric):
    """IoU of small, medium and large objects over a dataset.

    An object is an 8-connected region of a class in the truth: touching objects of one class count
    as one. Its pixels are counted under the size of the region, false positives under the size of
    the predicted region that they lie in. Over all sizes the counts add up to those of the ordinary
    IoU.

    `update(prediction, truth)` takes two (H, W) uint8 label maps. `compute()` returns
    `iou_by_size` (3,), the mean over the classes with objects of that size, without background,
    `recall_by_size` (3,), the same for the recall of the objects' pixels, and `iou_by_size_class`
    (3, K); 0 … 1, nan if there is no object; float64. Every small false region lowers the IoU of
    small objects, but not their recall.
    """

    dimensions: ClassVar[dict[str, int]] = {
        "iou_by_size": 1,
        "recall_by_size": 1,
        "iou_by_size_class": 2,
    }
    counts: torch.Tensor

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, **kwargs: Any) -> None:
        """Start from zero counts; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(num_classes, **kwargs)
        self.ignore_index = ignore_index
        # per size and class: pixels that are correct, missed and false
        counts = torch.zeros(len(SIZES), num_classes, 3, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, prediction: torch.Tensor, truth: torch.Tensor) -> None:
        """Add an image."""
        true, predicted = truth.cpu().numpy(), prediction.cpu().numpy()
        predicted = np.where(true == self.ignore_index, self.ignore_index, predicted)
        pixels = np.bincount(np.stack([true, predicted]).ravel(), minlength=256)
        pixels[[0, self.ignore_index]] = 0
        for k in np.flatnonzero(pixels).tolist():
            t, p = true == k, predicted == k
            x, y, width, height = cv2.boundingRect((t | p).view(np.uint8))
            part = slice(y, y + height), slice(x, x + width)
            t, p = t[part], p[part]
            counts = [_by_size(t, t & p), _by_size(t, t & ~p), _by_size(p, p & ~t)]
            self.counts[:, k] += torch.from_numpy(np.stack(counts, 1)).to(self.counts.device)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the IoU of each size."""
        counts = self.counts.cpu().double()
        objects = counts[..., :2].sum(-1)
        iou = torch.where(objects > 0, counts[..., 0] / counts.sum(-1), torch.nan)
        recall = counts[..., 0] / objects
        return {
            "iou_by_size": iou.nanmean(1),
            "recall_by_size": recall.nanmean(1),
            "iou_by_size_class": iou,
        }


def _by_size(mask: Mask, counted: Mask) -> npt.NDArray[np.int64]:
    """Count pixels (H, W), a subset of the mask's, by the size of their connected region."""
    number, regions = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    areas = np.bincount(regions[mask], minlength=number)
    pixels = np.bincount(regions[counted], minlength=number)
    return np.bincount(np.digitize(areas, LIMITS), pixels, minlength=len(SIZES)).astype(np.int64)
