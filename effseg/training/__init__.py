"""Training: one task, its scorers, its run directory, and the command line."""

from effseg.training.config import DetectionConfig, SegmentationConfig
from effseg.training.task import TrainingTask

__all__ = ["DetectionConfig", "SegmentationConfig", "TrainingTask"]
