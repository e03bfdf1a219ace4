"""Statistics of a dataset before training: classes, and image sizes."""

# K classes of the space, background included

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from effseg.data.dataset import Dataset
from effseg.data.files import in_threads
from effseg.data.sample import TASKS, TaskName
from effseg.errors import InputError, note

Counts = npt.NDArray[np.int64]
_EVAL_PIXELS = 8_000_000
_SIZES = 32  # number of images whose sizes are read
UNIT: dict[TaskName, str] = {"segmentation": "pixel", "detection": "box"}


def _counts(dataset: Dataset, numbers: Sequence[int]) -> Iterator[dict[TaskName, Counts]]:
    """Yield each image's pixels and boxes by class, (K,) each, without crowds.

    An image that cannot be read has no counts.
    """
    classes = len(dataset.classes)

    def read(number: int) -> dict[TaskName, Counts]:
        try:
            labels = dataset.labels(number)
        except InputError:
            return {}
        counts: dict[TaskName, Counts] = {}
        if "mask" in labels:
            pixels = np.bincount(labels["mask"].numpy().ravel(), minlength=256)
            counts["segmentation"] = pixels[:classes]
        if "boxes" in labels:
            crowd = labels.get("crowd", torch.zeros(len(labels["labels"]), dtype=torch.bool))
            boxes = (labels["labels"][~crowd] + 1).numpy()
            counts["detection"] = np.bincount(boxes, minlength=classes)
        return counts

    return in_threads(read, numbers)


def check_labels(dataset: Dataset) -> None:
    """Say which annotated classes have no pixel, and which no box.

    Images are read in random order until every class has occurred. InputError: a task has labels,
    but none of any class after the background.
    """
    names = dataset.classes.names
    absent = dataset.annotated()
    foreground = dict.fromkeys(absent, False)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    for image in _counts(dataset, order):
        for task, counts in image.items():
            absent[task] &= counts == 0
            foreground[task] |= bool(counts[1:].any())
        if not any(missing.any() for missing in absent.values()):
            break
    for task, missing in absent.items():
        if not foreground[task]:
            raise InputError(
                f"{', '.join(dataset.names)}: no {UNIT[task]} of any class in {len(dataset)} "
                f"images, expected some of {', '.join(names[1:])}"
            )
        if missing.any():
            classes = ", ".join(names[i] for i in np.flatnonzero(missing))
            note(f"data.train: no {UNIT[task]} of {classes}")


def require_counted(dataset: Dataset) -> None:
    """Raise InputError if every pixel of a source is ignored, or it has no box."""
    for member in dataset.members:
        numbers = range(member.first, member.first + len(member.source))
        uncounted = [task for task in TASKS if member.source.has(task).any()]
        for counts in _counts(dataset, numbers):
            uncounted = [task for task in uncounted if not counts.get(task, np.zeros(1)).any()]
            if not uncounted:
                break
        if uncounted:
            problem = "every pixel is ignored" if uncounted[0] == "segmentation" else "no box"
            raise InputError(f"{member.name}: {problem} in {member.source}: nothing to score")


def balanced_weights(dataset: Dataset) -> list[float]:
    """Return a weight per class by median frequency balancing, 1 for a class without a pixel.

    The frequency of a class is its share of the pixels of the images that contain it; its weight is
    the median frequency divided by its frequency (Eigen and Fergus 2015, arXiv 1411.4734, section
    6.3.2). All masks are read. InputError: every pixel of every mask is ignored.
    """
    count = len(dataset.classes)
    pixels, around = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for counts in _counts(dataset, range(len(dataset))):
        if "segmentation" in counts:
            class_pixels = counts["segmentation"]
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
