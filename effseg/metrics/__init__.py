"""Dataset-level metrics: counts are summed over the whole dataset and divided once."""

from effseg.metrics.boundary import BoundaryIoU
from effseg.metrics.confusion import SegmentationMetrics
from effseg.metrics.detection import COCOAveragePrecision, VOCAveragePrecision
from effseg.metrics.folders import score_folders

__all__ = [
    "BoundaryIoU",
    "COCOAveragePrecision",
    "SegmentationMetrics",
    "VOCAveragePrecision",
    "score_folders",
]
