"""The segmentations of COCO's format and its dialects as compressed run lengths."""

# H W pixels

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from effseg.errors import InputError

_FAR = 1e6
"""Pixels; the coder's memory grows with the length of an outline."""


def compress(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Return COCO's compressed run lengths for an image of `size` (H, W).

    Polygons of fewer than three corners are dropped: they have no area, and the coder would take
    all polygons for boxes if the first had two corners.

    A segmentation is run lengths, as a list or as COCO's text; or polygons, each a list of
    alternating x and y or of pairs; or one such polygon. InputError says what else it is.
    """
    from faster_coco_eval.core import mask as coder  # slow to import, and only needed here

    if not isinstance(segmentation, dict):
        runs = coder.merge(coder.frPyObjects(_polygons(segmentation), *size))
        return bytes(runs["counts"])
    counts = _run_lengths(segmentation, size)
    if isinstance(counts, str):
        return counts.encode()
    return bytes(coder.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"])


def decode(runs: bytes, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return the pixels of compressed run lengths, (H, W)."""
    from faster_coco_eval.core import mask as coder

    try:
        inside = coder.decode({"size": list(size), "counts": runs})
    except Exception as error:  # the coder documents no exceptions
        raise InputError(
            "segmentation cannot be drawn: run lengths that are none of an image of "
            f"{size[1]}x{size[0]} pixels"
        ) from error
    return np.asarray(inside, bool)


def bounding_box(bbox: Any, runs: bytes, size: tuple[int, int]) -> list[float]:
    """Return x, y, width, height of `bbox`, or of the run lengths if it is empty."""
    from faster_coco_eval.core import mask as coder

    try:
        if not bbox and runs:
            bbox = coder.toBbox({"size": list(size), "counts": runs})
        x, y, width, height = map(float, bbox)
    except Exception as error:  # the coder documents no exceptions
        stated = f"bbox {bbox!r:.60}" if bbox else "no bbox"
        raise InputError(f"{stated}, expected x, y, width, height") from error
    return [x, y, width, height]


def _run_lengths(runs: dict[str, Any], size: tuple[int, int]) -> list[int] | str:
    try:
        sides = [int(float(side)) for side in runs["size"]]
        counts = runs["counts"] or [0]
        numbers = [] if isinstance(counts, str) else [int(float(value)) for value in counts]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError("run lengths without a usable size or counts") from error
    if sides != list(size):
        turned = " (width and height in COCO's order)" if sides == [*size][::-1] else ""
        raise InputError(f"run lengths of size {sides}, expected {list(size)}{turned}")
    if isinstance(counts, str):
        return counts
    if min(numbers) < 0:
        raise InputError(f"run lengths with the negative number {min(numbers)}")
    if sum(numbers) != size[0] * size[1]:
        raise InputError(
            f"run lengths of {sum(numbers)} pixels, expected {size[0] * size[1]} as the image has"
        )
    return numbers


def _polygons(segmentation: Any) -> list[list[float]]:
    try:  # for speed: what COCO itself writes needs no array
        plain = all(len(part) >= 6 and math.isfinite(sum(part)) for part in segmentation)
    except (TypeError, OverflowError):
        plain = False
    parts = segmentation if plain else _other_polygons(segmentation)
    odd = [len(part) for part in parts if len(part) % 2]
    if odd:
        raise InputError(f"polygon of {odd[0]} numbers, expected x and y in turn")
    parts = [part for part in parts if len(part) >= 6]
    if not parts:
        raise InputError("no polygon of 3 or more corners")
    if max(max(map(abs, part)) for part in parts) > _FAR:
        raise InputError("polygon with a corner far outside the image")
    return parts


def _other_polygons(segmentation: Any) -> list[list[float]]:
    """Return polygons of pairs or of text, or a single polygon of numbers or pairs."""
    try:
        arrays = [np.asarray(part, np.float64) for part in segmentation]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("segmentation that is neither polygons nor run lengths") from error
    numbers = all(array.ndim == 0 for array in arrays)
    if numbers or (len(arrays) > 2 and all(array.shape == (2,) for array in arrays)):
        arrays = [np.array(arrays)]
    if any(array.ndim > 2 or (array.ndim == 2 and array.shape[1] != 2) for array in arrays):
        raise InputError("polygon of corners that are no pairs of x and y")
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError("polygon with a corner that is no number")
    return [array.ravel().tolist() for array in arrays]
