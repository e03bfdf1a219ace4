"""Dataset-level metrics: sums over the whole data set first, ratios once at the end."""

from effseg.metrics.boundary import BoundaryIoU
from effseg.metrics.detection import COCOAveragePrecision, VOCAveragePrecision
from effseg.metrics.folders import score_folders
from effseg.metrics.segmentation import SegmentationMetrics

__all__ = [
    "BoundaryIoU",
    "COCOAveragePrecision",
    "SegmentationMetrics",
    "VOCAveragePrecision",
    "score_folders",
]
