"""Read a whole dataset once and report its contents and problems."""

# H W pixels, K classes

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from effseg.data.counts import UNIT
from effseg.data.dataset import class_lists
from effseg.data.files import in_threads
from effseg.data.sample import IGNORE_INDEX, Sample, TaskName
from effseg.data.sources.source import Size, Source
from effseg.errors import InputError


@dataclass
class CheckReport:
    """Result of `check`."""

    images: int
    """Listed images, readable or not."""
    class_names: tuple[str, ...]
    task_names: dict[TaskName, tuple[str, ...]]
    """Those of each task that the source has labels for, background first."""
    class_pixels: npt.NDArray[np.int64]
    """(K,) pixels of each class over all readable masks."""
    class_images: npt.NDArray[np.int64]
    """(K,) images that show each class, in their mask or their boxes."""
    class_boxes: npt.NDArray[np.int64]
    """(K,) boxes of each class; the background has none."""
    ignored_pixels: int
    sizes: Counter[Size]
    """(H, W) in pixels to number of images."""
    problems: list[str]
    """One line each, in the order of the images."""

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return int(self.class_boxes.sum())

    @property
    def absent(self) -> dict[str, list[str]]:
        """The classes without a pixel and those without a box, by that word.

        Not summed: objects of another class that cover a class's make all its pixels ignored, while
        its boxes remain.
        """
        counts = {"segmentation": self.class_pixels, "detection": self.class_boxes}
        absent = {}
        for task, names in self.task_names.items():
            count = dict(zip(self.class_names, counts[task].tolist(), strict=True))
            first = 1 if task == "detection" or not self.class_pixels.any() else 0
            absent[UNIT[task]] = [name for name in names[first:] if not count[name]]
        return absent

    @property
    def nothing(self) -> list[str]:
        """One line if images can be read but no foreground class has a pixel or a box."""
        if not self.sizes or self.class_pixels[1:].any() or self.boxes:
            return []
        return [f"no pixel or box of any class, expected some of {', '.join(self.class_names[1:])}"]

    @property
    def class_shares(self) -> npt.NDArray[np.float64]:
        """(K,) share of each class in the labelled pixels, 0 … 1, summing to 1 (or all 0)."""
        shares: npt.NDArray[np.float64] = self.class_pixels / max(int(self.class_pixels.sum()), 1)
        return shares

    @property
    def ignored_share(self) -> float:
        """Share of the ignored pixels in all pixels, 0 … 1."""
        return self.ignored_pixels / max(self.ignored_pixels + int(self.class_pixels.sum()), 1)


def check(source: Source, progress: bool = False, train: Sequence[Source] = ()) -> CheckReport:
    """Read every image, in threads, and list all problems, not only the first.

    Boxes that the source would drop are problems, too. `train`: for a source of evaluation, those
    of training, see `Source.settle`.
    """
    problems: list[str] = []
    try:
        source.settle(train)
    except InputError as error:
        problems.append(str(error))
    source = copy.copy(source)
    source.problems, source.invalid = problems, "error"
    count = len(source)  # reports problems of the lists
    task_names = {task: classes.names for task, classes in class_lists(source).items()}
    lists = list(task_names.values())
    names = tuple(dict.fromkeys(chain(*lists)))
    # Masks come first, so their values are indices into names; boxes may have a different list.
    class_index = torch.tensor([names.index(name) for name in lists[-1]])
    pixels, images, boxes = np.zeros((3, len(names)), np.int64)
    report = CheckReport(count, names, task_names, pixels, images, boxes, 0, Counter(), problems)

    # The first image is read from the source itself, so that its copies share what it caches.
    first = [_read(source, index) for index in range(min(count, 1))]
    rest = in_threads(lambda index: _read(copy.copy(source), index), range(1, count))
    results = track(chain(first, rest), "reading", count, disable=not progress)
    for sample, size, new_problems in results:
        report.problems += new_problems
        if size is None:
            continue
        mask = sample.get("mask", torch.zeros(0, dtype=torch.uint8))
        values = torch.bincount(mask.flatten(), minlength=max(256, len(names))).numpy()
        labels = sample.get("labels", torch.zeros(0, dtype=torch.int64))
        found = torch.bincount(class_index[labels + 1], minlength=len(names)).numpy()
        report.ignored_pixels += int(values[IGNORE_INDEX])
        values[IGNORE_INDEX] = 0  # a class of boxes may have this number
        pixels += values[: len(names)]
        images += (values[: len(names)] > 0) | (found > 0)
        boxes += found
        report.sizes[size] += 1
    return report


def _read(source: Source, index: int) -> tuple[Sample, Size | None, list[str]]:
    """Read labels and size of an image; a problem with one does not hide those of the other."""
    problems = source.problems = []
    size, labels = None, Sample()
    try:
        image = source.image(index)
        size = (image.shape[1], image.shape[2])
    except InputError as error:
        problems.append(str(error))
    try:
        labels = source.labels(index, size)
    except InputError as error:
        size = None
        problems.append(str(error))
    return labels, size, list(dict.fromkeys(problems))
