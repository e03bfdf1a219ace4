"""What all sources have: images, their labels, and which labels an image has."""

# H W pixels, N boxes, S images of the source

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import clip_boxes_to_image

from effseg.data.classes import Classes
from effseg.data.files import image_size, is_turned, read_image
from effseg.data.sample import Sample, TaskName, keep_boxes
from effseg.errors import InputError

Flags = npt.NDArray[np.bool_]
Size = tuple[int, int]
Invalid = Literal["error", "drop"]
"""What to do with a box that cannot be one: stop and name it, or leave it out."""


class Source(ABC):
    """Images of one format, with the labels that each of them has.

    A constructor touches no file and every argument has a default; files are looked for when the
    first image, id or class is asked for. Images are numbered from 0 in the order of `ids`.

    A subclass gives `tasks`, `classes`, `ids`, `has`, `image_path` and
    `read_labels`.
    """

    root: str | Path | None = None
    """Where the files lie; None: where the format's own default says."""
    card: str | None = None
    """The data set card under which an id means one image everywhere; None: ids mean nothing."""
    invalid: Invalid = "error"
    problems: list[str] | None = None
    """Where `refuse` notes what is wrong; None: it raises."""

    @property
    @abstractmethod
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that any image has labels for."""

    @property
    @abstractmethod
    def classes(self) -> Classes:
        """The class list, background first; box label 0 is the class after it."""

    @property
    def mask_classes(self) -> Classes:
        """The class list of the masks, where the boxes have another."""
        return self.classes

    @property
    def box_classes(self) -> Classes:
        """The class list of the boxes, where the masks have another."""
        return self.classes

    @property
    def categories(self) -> dict[int, int]:
        """The category id of each box label in a format that numbers its classes, as COCO's."""
        return {}

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The images' ids, (S,)."""

    @abstractmethod
    def has(self, task: TaskName) -> Flags:
        """Return which images have labels for a task, (S,) bool, without reading images."""

    @abstractmethod
    def image_path(self, index: int) -> Path:
        """Return the file of an image."""

    @abstractmethod
    def read_labels(self, index: int) -> Sample:
        """Return `mask` and what there is of boxes as they lie on disk, unchecked."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def __str__(self) -> str:
        """Return what to call the source in an error."""
        return f"{type(self).__name__} at {self.root}"

    def complete(self, root: str | Path | None, classes: Sequence[str] | str | None) -> None:
        """Take the data module's root, if the source has none of its own.

        Formats that want a class list take that as well.
        """
        self.root = root if self.root is None else self.root

    def prepare(self) -> None:  # noqa: B027 (most formats have nothing to prepare)
        """Draw or download what is not there; to be called in one process of a machine."""

    def settle(self, train: Sequence["Source"] = ()) -> None:  # noqa: B027
        """Decide now what is decided once for all files, where a format leaves something open.

        Args:
            train: the sources of training, whose decision holds in evaluation.
        """

    def verify(self) -> None:  # noqa: B027
        """Look for all files now, so that a missing one shows before training.

        Raises:
            InputError: something is missing; the first is named, all are counted.
        """

    def image(self, index: int) -> torch.Tensor:
        """Decode an image: (3, H, W) uint8 RGB.

        Raises:
            InputError: the file is missing, truncated, corrupt, or deeper than 8 bits.
        """
        return read_image(self.image_path(index))

    def size(self, index: int) -> Size:
        """Return (H, W) of an image without decoding it; raises as `image`."""
        return image_size(self.image_path(index))

    def labels(self, index: int, size: Size | None = None) -> Sample:
        """Read the labels that an image has.

        Boxes that reach over the edge are cut there.

        Args:
            index: number of the image.
            size: (H, W) of the image, where it is known already.

        Returns:
            `mask` (H, W) uint8; `boxes` (N, 4) float32, `labels` (N,) int64, and of
            `crowd` (N,) bool, `difficult` (N,) bool and `area` (N,) float32 those that the
            format has. An image without objects has empty boxes; one that nobody looked at for
            objects has none of these keys.

        Raises:
            InputError: a file is missing or broken, a mask is not of the image's size, or, unless
                `invalid` is `drop`, a box has no area inside the image.
        """
        found = self.read_labels(index)
        size = self.size(index) if size is None else size
        stated = found.pop("stated_size", size)
        if stated != size:
            self.refuse(
                f"{self.where(index, 'detection')}: size {stated[1]}x{stated[0]}, expected "
                f"{size[1]}x{size[0]} as its image {self.image_path(index)}"
            )
        if "mask" in found and tuple(found["mask"].shape) != size:
            height, width = found.pop("mask").shape
            path = self.image_path(index)
            turned = (width, height) == size and is_turned(path)
            exif = " turned by its EXIF tag (the mask is not)" if turned else ""
            self.refuse(
                f"{self.where(index, 'segmentation')}: mask of {width}x{height} pixels, expected "
                f"{size[1]}x{size[0]} as its image {path}{exif}"
            )
        if "boxes" in found:
            good = valid_boxes(found["boxes"], size)
            if not good.all():
                for number in good.logical_not().nonzero().flatten().tolist():
                    if self.invalid == "error":
                        problem = describe_invalid(found["boxes"][number], size)
                        self.refuse(f"{self.where(index, 'detection', number)}: {problem}")
                keep_boxes(found, good)
            found["boxes"] = clip_boxes_to_image(found["boxes"], size)
        return found

    def refuse(self, problem: str) -> None:
        """Stop at what is wrong with labels, or note it in `problems` and go on without them.

        Raises:
            InputError: `problems` is None.
        """
        if self.problems is None:
            raise InputError(problem)
        self.problems.append(problem)

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return what to call the labels of an image, or one object of them, in an error."""
        return f"{self}: image {self.ids[index]}"


def valid_boxes(boxes: torch.Tensor, size: Size) -> torch.Tensor:
    """Return which boxes (N, 4) have an area inside an image of `size` (H, W), as (N,) bool."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
    return boxes.isfinite().all(-1) & (x2 > x1) & (y2 > y1) & inside


def describe_invalid(box: torch.Tensor, size: Size) -> str:
    """Return what is wrong with a box (4,) that `valid_boxes` refuses."""
    x1, y1, x2, y2 = box.tolist()
    corners = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not box.isfinite().all():
        return f"{corners}: expected four finite numbers"
    if x2 <= x1 or y2 <= y1:
        return f"{corners} has no area: expected x1 < x2 and y1 < y2"
    return f"{corners} lies outside its image of {size[1]}x{size[0]} pixels"
