"""Checks of labelled boxes, and Pascal VOC's detection data."""

# H W pixels, N boxes

from pathlib import Path
from typing import Literal, get_args

import torch
from torchvision.ops import clip_boxes_to_image

from effseg.data.dataset import PhotoDataset, Transform
from effseg.data.files import read_image, read_lines
from effseg.data.pairs import look_for
from effseg.data.samples import Classes, Sample, TaskName
from effseg.data.voc import VOCSegmentation, find_voc, read_boxes
from effseg.errors import InputError

Invalid = Literal["error", "drop"]
"""What to do with a box that cannot be one: stop and name it, or leave it out."""
VOCDetectionSplit = Literal["train", "val", "trainval"]


def valid_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return which boxes (N, 4) have an area inside a photo of ``size`` (H, W), as (N,) bool."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
    return boxes.isfinite().all(-1) & (x2 > x1) & (y2 > y1) & inside


def find_invalid(boxes: torch.Tensor, size: tuple[int, int]) -> tuple[int, str] | None:
    """Return the first box that :func:`valid_boxes` refuses, and what is wrong with it.

    Args:
        boxes: (N, 4), x1 y1 x2 y2 in pixels.
        size: (H, W) of the photo.
    """
    wrong = valid_boxes(boxes, size).logical_not().nonzero()
    if not len(wrong):
        return None
    number = int(wrong[0])
    x1, y1, x2, y2 = boxes[number].tolist()
    box = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not boxes[number].isfinite().all():
        return number, f"{box}: expected four finite numbers"
    if x2 <= x1 or y2 <= y1:
        return number, f"{box} has no area: expected x1 < x2 and y1 < y2"
    return number, f"{box} lies outside its photo of {size[1]}x{size[0]} pixels"


class VOCDetection(PhotoDataset):
    """Photos and boxes of VOC 2012: ``ImageSets/Main`` and ``Annotations``.

    Boxes that reach over the photo's edge are cut there. Difficult objects are kept, and marked:
    training takes them as objects, the score leaves them out.

    Samples: ``image`` (3, H, W) uint8 RGB, ``boxes`` (N, 4) float32 as x1 y1 x2 y2 in pixels (x2,
    y2 exclusive), ``labels`` (N,) int64 0 … 19, ``difficult`` (N,) bool; N may be 0.

    Source: Everingham et al., IJCV 2015.

    Args:
        root: see :func:`effseg.data.voc.find_voc`.
        split: ``train``, ``val`` or ``trainval``.
        transform: a function from a sample to a sample.
        card: the data set card with the class list.

    Raises:
        InputError: unknown split, no VOC at the root, an empty list, or a missing file; on reading
            also a file that is no annotation, an unknown class, or a box without an area inside
            its photo.
    """

    tasks: tuple[TaskName, ...] = ("detection",)

    def __init__(
        self,
        root: str | Path | None = None,
        split: VOCDetectionSplit = "train",
        transform: Transform | None = None,
        card: str = VOCSegmentation.card,
    ) -> None:
        """Find the files of the split and check that all are there."""
        if split not in get_args(VOCDetectionSplit):
            known = ", ".join(get_args(VOCDetectionSplit))
            raise InputError(f"split {split!r}: expected one of {known}")
        voc = find_voc(root)
        source = voc / "ImageSets" / "Main" / f"{split}.txt"
        super().__init__(Classes.from_card(card), transform, source)
        self.names = read_lines(source)
        self.photos = [voc / "JPEGImages" / f"{name}.jpg" for name in self.names]
        self.annotations = [voc / "Annotations" / f"{name}.xml" for name in self.names]
        look_for(self.photos, "photo", source)
        look_for(self.annotations, "annotation", source)

    @property
    def ids(self) -> list[str]:
        """The photos' ids."""
        return self.names

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.names)

    def read(self, index: int) -> Sample:
        """Read photo and boxes; raises as the class says."""
        image = read_image(self.photos[index])
        target = read_boxes(self.annotations[index], self.classes)
        size = (image.shape[1], image.shape[2])
        wrong = find_invalid(target["boxes"], size)
        if wrong is not None:
            number, problem = wrong
            raise InputError(f"{self.annotations[index]}: object {number + 1}: {problem}")
        target["boxes"] = clip_boxes_to_image(target["boxes"], size)
        return Sample(id=self.names[index], image=image, **target)
