"""IoU by the size of objects."""

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
"""COCO's: below the first a region is small, from the second on it is large; pixels."""


class SizeIoU(DatasetMetric):
    """IoU of small, medium and large objects, summed over a dataset.

    An object is a connected region (8 neighbours) of a class in the truth: masks do not tell apart
    objects of one class that touch. Its pixels count for the size of the region; a pixel that is
    predicted falsely counts for the size of the predicted region that it lies in. Over all sizes
    these counts add up to those of the ordinary IoU.

    `update(prediction, truth)` takes two (H, W) uint8 label maps. `compute()` returns
    `iou_by_size` (3,), the mean over the classes that have objects of the size, background left
    out, `recall_by_size` (3,), the same of the share of the objects' pixels that are predicted
    right, and `iou_by_size_class` (3, K); 0 … 1, nan where there is no object; float64. Small
    IoU falls with every crumb that is predicted falsely, recall does not.

    Args:
        num_classes: K, background included.
        ignore_index: true label of the pixels that are not counted.
    """

    dimensions: ClassVar[dict[str, int]] = {
        "iou_by_size": 1,
        "recall_by_size": 1,
        "iou_by_size_class": 2,
    }
    counts: torch.Tensor

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, **kwargs: Any) -> None:
        """Start from zero counts; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        # of each size and class: pixels that are right, missed and false
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
            found = [_by_size(t, t & p), _by_size(t, t & ~p), _by_size(p, p & ~t)]
            self.counts[:, k] += torch.from_numpy(np.stack(found, 1)).to(self.counts.device)

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
    """Count pixels (H, W), a part of the mask's, by the size of the region that they lie in."""
    number, regions = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    areas = np.bincount(regions[mask], minlength=number)
    pixels = np.bincount(regions[counted], minlength=number)
    return np.bincount(np.digitize(areas, LIMITS), pixels, minlength=len(SIZES)).astype(np.int64)
