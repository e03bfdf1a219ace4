"""Losses for masks and boxes; `Criterion` combines both."""

from effseg.losses.detection import DetectionLoss
from effseg.losses.joint import Criterion
from effseg.losses.segmentation import SegmentationLoss, cross_entropy

__all__ = ["Criterion", "DetectionLoss", "SegmentationLoss", "cross_entropy"]
