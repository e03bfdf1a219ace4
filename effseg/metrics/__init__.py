"""Dataset-level metrics: sums over the whole data set first, ratios once at the end."""

from effseg.metrics.boundary import BoundaryIoU
from effseg.metrics.folders import score_folders
from effseg.metrics.segmentation import SegmentationMetrics

__all__ = ["BoundaryIoU", "SegmentationMetrics", "score_folders"]
