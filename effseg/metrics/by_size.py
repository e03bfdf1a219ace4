"""IoU by the size of objects."""

# H W pixels, K classes

from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt
import torch

from effseg.data.sample import IGNORE_INDEX
from effseg.metrics.confusion import Bytes, DatasetMetric

SIZES = ("small", "medium", "large")
LIMITS = (32**2, 96**2)
"""COCO's: below the first a region is small, from the second on it is large; pixels."""


class SizeIoU(DatasetMetric):
    """IoU of small, medium and large objects, summed over a dataset.

    An object is a connected region (8 neighbours) of a class in the truth: masks do not tell apart
    objects of one class that touch. Its pixels count for the size of the region; a pixel that is
    predicted falsely counts for the size of the predicted region that it lies in. Over all sizes
    these counts add up to those of the ordinary IoU.

    ``update(prediction, truth)`` takes two (H, W) uint8 label maps. ``compute()`` returns
    ``iou_by_size`` (3,), the mean over the classes that have objects of the size, background left
    out, ``recall_by_size`` (3,), the same of the share of the objects' pixels that are predicted
    right, and ``iou_by_size_class`` (3, K); 0 … 1, nan where there is no object; float64. Small
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
        """Start from zero counts; ``kwargs`` are those of ``torchmetrics.Metric``."""
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        # of each size and class: pixels that are right, missed and false
        counts = torch.zeros(len(SIZES), num_classes, 3, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, prediction: torch.Tensor, truth: torch.Tensor) -> None:
        """Add an image."""
        true, predicted = truth.cpu().numpy(), prediction.cpu().numpy()
        predicted = np.where(true == self.ignore_index, self.ignore_index, predicted)
        present = np.union1d(np.unique(true), np.unique(predicted))
        for k in present[(present > 0) & (present != self.ignore_index)].tolist():
            both = ((true == k) | (predicted == k)).view(np.uint8)
            x, y, width, height = cv2.boundingRect(both)
            part = slice(y, y + height), slice(x, x + width)
            t, p = true[part] == k, predicted[part] == k
            size, predicted_size = _sizes(t.view(np.uint8)), _sizes(p.view(np.uint8))
            pixels = (size[t & p], size[t & ~p], predicted_size[p & ~t])
            found = [np.bincount(values, minlength=len(SIZES)) for values in pixels]
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


def _sizes(mask: Bytes) -> npt.NDArray[np.intp]:
    """Return of each pixel (H, W) the number in ``SIZES`` of the region that it lies in."""
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    by_region = np.digitize(stats[:, cv2.CC_STAT_AREA], LIMITS)
    sizes: npt.NDArray[np.intp] = by_region[regions]
    return sizes
