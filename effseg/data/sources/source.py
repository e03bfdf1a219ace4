"""The interface of sources: images, their labels, and which labels an image has."""

# H W pixels, N boxes, S images of the source

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import clip_boxes_to_image

from effseg.data.classes import Classes
from effseg.data.files import read_image
from effseg.data.opening import image_size, is_turned
from effseg.data.sample import Sample, TaskName, keep_boxes
from effseg.errors import InputError

Flags = npt.NDArray[np.bool_]
Size = tuple[int, int]
Invalid = Literal["error", "drop"]
"""How to handle an invalid box: raise an error that names it, or drop it."""


class Source(ABC):
    """Images in one format, with their labels; images are indexed from 0 in the order of `ids`.

    Constructors access no files and all arguments have defaults; files are accessed when the first
    image, id or class is requested.

    Subclasses define `tasks`, `classes`, `ids`, `image_path` and `read_labels`, and `has` unless
    all images have the labels of all tasks.
    """

    root: str | Path | None = None
    """Folder of the files; None: the format's default."""
    card: str | None = None
    """Dataset card whose ids are unique to an image; None: ids may repeat between datasets."""
    invalid: Invalid = "error"
    problems: list[str] | None = None
    """Where `refuse` collects problems; None: it raises them."""

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
        """The class list of the masks."""
        return self.classes

    @property
    def box_classes(self) -> Classes:
        """The class list of the boxes."""
        return self.classes

    @property
    def categories(self) -> dict[int, int]:
        """The category id of each box label in a format that numbers its classes, as COCO's."""
        return {}

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The images' ids, (S,)."""

    def has(self, task: TaskName) -> Flags:
        """Return which images have labels for a task, (S,) bool, without reading images."""
        return np.full(len(self), task in self.tasks)

    @abstractmethod
    def image_path(self, index: int) -> Path:
        """Return the file of an image."""

    @abstractmethod
    def read_labels(self, index: int) -> Sample:
        """Return the mask and the boxes, if any, as they are on disk, unchecked."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def __str__(self) -> str:
        """Return the source's name in error messages."""
        return f"{type(self).__name__} at {self.root}"

    def complete(self, root: str | Path | None, classes: Sequence[str] | str | None) -> None:
        """Use the data module's root, and classes if the format needs them, unless already set."""
        self.root = root if self.root is None else self.root

    def prepare(self) -> None:  # noqa: B027 (most formats have nothing to prepare)
        """Draw or download missing data; call it in one process per machine."""

    def settle(self, train: Sequence["Source"] = ()) -> None:  # noqa: B027
        """Resolve ambiguities of the format for all files, in evaluation as in `train`."""

    def verify(self) -> None:  # noqa: B027
        """Check, before training, that all files exist; InputError names the first missing one."""

    def image(self, index: int) -> torch.Tensor:
        """Decode an image: (3, H, W) uint8 RGB; raises as `read_image`."""
        return read_image(self.image_path(index))

    def size(self, index: int) -> Size:
        """Return (H, W) of an image without decoding it; raises as `image`."""
        return image_size(self.image_path(index))

    def labels(self, index: int, size: Size | None = None) -> Sample:
        """Read the labels of an image; boxes are clipped to it.

        Args:
            index: index of the image.
            size: (H, W) of the image, if known.

        Returns:
            `mask` (H, W) uint8; `boxes` (N, 4) float32, `labels` (N,) int64, and of
            `crowd` (N,) bool, `difficult` (N,) bool and `area` (N,) float32 those that the
            format has. An image without objects has empty boxes; one without box annotations has
            none of these keys.

        Raises:
            InputError: a file is missing or broken, a mask differs in size from the image, or,
                unless `invalid` is `drop`, a box has no area inside the image.
        """
        sample = self.read_labels(index)
        size = self.size(index) if size is None else size
        self._check_size(index, "detection", sample.pop("stated_size", size), size)
        if "mask" in sample:
            height, width = sample["mask"].shape
            if not self._check_size(index, "segmentation", (height, width), size):
                del sample["mask"]
        if "boxes" in sample:
            valid = valid_boxes(sample["boxes"], size)
            if self.invalid == "error":
                for number in valid.logical_not().nonzero().flatten().tolist():
                    problem = describe_invalid(sample["boxes"][number], size)
                    self.refuse(f"{self.where(index, 'detection', number)}: {problem}")
            keep_boxes(sample, valid)
            sample["boxes"] = clip_boxes_to_image(sample["boxes"], size)
        return sample

    def _check_size(self, index: int, task: TaskName, stated: Size, size: Size) -> bool:
        """Refuse labels of another size (H, W) than the image; return whether they agree."""
        if stated != size:
            path = self.image_path(index)
            turned = stated == (size[1], size[0]) and is_turned(path)
            self.refuse(
                f"{self.where(index, task)}: {stated[1]}x{stated[0]} pixels, expected "
                f"{size[1]}x{size[0]} as its image {path}"
                f"{' turned by its EXIF tag (the labels are not)' if turned else ''}"
            )
        return stated == size

    def refuse(self, problem: str) -> None:
        """Raise InputError, or collect the problem if `problems` is a list."""
        if self.problems is None:
            raise InputError(problem)
        self.problems.append(problem)

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the name of an image's labels, or of one object, in error messages."""
        return f"{self}: image {self.ids[index]}"


def check_choices(**choices: tuple[str | None, Any]) -> None:
    """Refuse a setting that is neither None nor in its `Literal`; or if all are None."""
    for key, (value, kind) in choices.items():
        if value is not None and value not in get_args(kind):
            raise InputError(f"{key}={value!r}: expected one of {', '.join(get_args(kind))}")
    if all(value is None for value, _ in choices.values()):
        raise InputError(f"{' and '.join(choices)} are both null, expected at least one of them")


def valid_boxes(
    boxes: torch.Tensor, size: Size | tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return which boxes (N, 4) have an area inside their image, (N,) bool; H and W may be (N,)."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
    return boxes.isfinite().all(-1) & (x2 > x1) & (y2 > y1) & inside


def describe_invalid(box: torch.Tensor, size: Size) -> str:
    """Describe why a box (4,) is invalid by `valid_boxes`."""
    x1, y1, x2, y2 = box.tolist()
    corners = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not box.isfinite().all():
        return f"{corners}: expected four finite numbers"
    if x2 <= x1 or y2 <= y1:
        return f"{corners} has no area: expected x1 < x2 and y1 < y2"
    return f"{corners} lies outside its image of {size[1]}x{size[0]} pixels"
