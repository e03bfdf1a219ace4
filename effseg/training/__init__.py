"""Training: one task, its scorers, its run directory, and the command line."""

from effseg.training.task import DetectionConfig, SegmentationConfig, TrainingTask

__all__ = ["DetectionConfig", "SegmentationConfig", "TrainingTask"]
