"""Old names, until models, losses and metrics import effseg.data.sample and .classes."""

from effseg.data.classes import Classes, voc_colour
from effseg.data.sample import IGNORE_INDEX, TASKS, Batch, Sample, TaskName

__all__ = ["IGNORE_INDEX", "TASKS", "Batch", "Classes", "Sample", "TaskName", "voc_colour"]
