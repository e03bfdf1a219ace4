"""Data: images on disk, sources, samples, batches.

Importing it loads neither Lightning nor albumentations; the data module does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effseg.data.classes import Classes, LabelSpace, load_classes
from effseg.data.sample import IGNORE_INDEX, TASKS, Batch, Sample, TaskName
from effseg.data.sampling import Stage
from effseg.data.sources.coco import COCO
from effseg.data.sources.folder import Folder
from effseg.data.sources.source import Source
from effseg.data.sources.voc import VOC

if TYPE_CHECKING:
    from effseg.data.datamodule import ImageDataModule
    from effseg.data.sources.shapes import Shapes

__all__ = [
    "COCO",
    "IGNORE_INDEX",
    "TASKS",
    "VOC",
    "Batch",
    "Classes",
    "Folder",
    "ImageDataModule",
    "LabelSpace",
    "Sample",
    "Shapes",
    "Source",
    "Stage",
    "TaskName",
    "load_classes",
]

# These need packages that only training and drawing have a use for.
_LATER = {"ImageDataModule": "effseg.data.datamodule", "Shapes": "effseg.data.sources.shapes"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
