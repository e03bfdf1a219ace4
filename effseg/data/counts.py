"""Statistics of a dataset before training: classes, and image sizes."""

# K classes of the space, background included

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from effseg.data.dataset import Dataset
from effseg.data.sample import TASKS, Sample, TaskName
from effseg.errors import InputError, note

Counts = npt.NDArray[np.int64]
_AT_ONCE = 64
_EVAL_PIXELS = 8_000_000
_SIZES = 32  # images whose sizes are looked at


def _labels(dataset: Dataset, numbers: Sequence[int]) -> Iterator[Sample]:
    """Yield labels, read in threads; empty for files that cannot be read."""

    def read(number: int) -> Sample:
        try:
            return dataset.labels(number)
        except InputError:
            return Sample()

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(numbers), _AT_ONCE):
            yield from pool.map(read, numbers[start : start + _AT_ONCE])


def _counts(labels: Sample, count: int) -> dict[TaskName, Counts]:
    """Return the pixels and the boxes of each class, (K,) each; crowds are no boxes."""
    counts: dict[TaskName, Counts] = {}
    if "mask" in labels:
        counts["segmentation"] = np.bincount(labels["mask"].numpy().ravel(), minlength=256)[:count]
    if "boxes" in labels:
        numbers = labels["labels"]
        if "crowd" in labels:
            numbers = numbers[~labels["crowd"]]
        counts["detection"] = np.bincount(numbers.numpy() + 1, minlength=count)
    return counts


def absent_classes(dataset: Dataset) -> dict[TaskName, list[str]]:
    """Return the annotated classes without a pixel, and those without a box.

    Images are read in random order until every class has occurred.

    Raises:
        InputError: a task has labels, but none of any class after the background.
    """
    names = dataset.classes.names
    absent = dataset.annotated()
    foreground = dict.fromkeys(absent, False)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    for labels in _labels(dataset, order):
        for task, counts in _counts(labels, len(names)).items():
            absent[task] &= counts == 0
            foreground[task] |= bool(counts[1:].any())
        if not any(missing.any() for missing in absent.values()):
            break
    for task, present in foreground.items():
        if not present:
            raise InputError(
                f"{', '.join(dataset.names)}: no {_UNIT[task]} of any class in {len(dataset)} "
                f"images, expected some of {', '.join(names[1:])}"
            )
    return {task: [names[i] for i in np.flatnonzero(missing)] for task, missing in absent.items()}


_UNIT: dict[TaskName, str] = {"segmentation": "pixel", "detection": "box"}


def describe_absent(absent: dict[TaskName, list[str]]) -> list[str]:
    """Return a line for each task that lacks labels of a class."""
    return [f"no {_UNIT[t]} of {', '.join(names)}" for t, names in absent.items() if names]


def require_counted(dataset: Dataset) -> None:
    """Check that each source has something to score.

    Raises:
        InputError: every pixel of a source is ignored, or it has no box.
    """
    for member in dataset.members:
        numbers = range(member.first, member.first + len(member.source))
        uncounted = {task for task in TASKS if member.source.has(task).any()}
        for labels in _labels(dataset, numbers) if uncounted else ():
            counts = _counts(labels, len(dataset.classes))
            uncounted -= {task for task, count in counts.items() if count.any()}
            if not uncounted:
                break
        for task in TASKS:
            if task in uncounted:
                problem = "every pixel is ignored" if task == "segmentation" else "no box"
                raise InputError(f"{member.name}: {problem} in {member.source}: nothing to score")


def balanced_weights(dataset: Dataset) -> list[float]:
    """Return a weight per class by median frequency balancing, 1 for a class without a pixel.

    The frequency of a class is its share of the pixels of the images that contain it; its weight is
    the median frequency divided by its frequency (Eigen and Fergus 2015, arXiv 1411.4734, section
    6.3.2). All masks are read.

    Raises:
        InputError: every pixel of every mask is ignored.
    """
    count = len(dataset.classes)
    pixels, around = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for labels in _labels(dataset, range(len(dataset))):
        class_pixels = _counts(labels, count).get("segmentation")
        if class_pixels is not None:
            pixels += class_pixels
            around += np.where(class_pixels > 0, class_pixels.sum(), 0)
    present = pixels > 0
    if not present.any():
        raise InputError("segmentation.class_weights: auto, but no mask has a pixel that counts")
    frequency = pixels[present] / around[present]
    weights = np.ones(count)
    weights[present] = np.median(frequency) / frequency
    return [float(weight) for weight in weights]


def evaluation_batch(dataset: Dataset, limit: int) -> int:
    """Return the batch size of evaluation: at most `limit` images and 8 megapixels."""
    picked = range(0, len(dataset), max(1, len(dataset) // _SIZES))
    height, width = max((dataset.size(i) for i in picked), key=lambda size: size[0] * size[1])
    count = max(1, min(limit, _EVAL_PIXELS // (height * width)))
    if count < limit:
        note(
            f"data.val: images of up to {width}x{height} pixels: {count} a batch, not {limit} "
            "(a batch of evaluation has at most 8 megapixels)"
        )
    return count
