"""The segmentations of COCO's format and its dialects as compressed run lengths."""

# H W pixels

import math
from typing import Any

import numpy as np

from effseg.errors import InputError

_FAR = 1e6
"""Pixels; the coder's memory grows with the length of an outline."""


def compress(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Return COCO's compressed run lengths.

    Args:
        segmentation: run lengths, as a list or as COCO's text; or polygons, each a list of x and y
            in turn or of pairs; or one such polygon. A part of fewer than three corners has no area
            and is left out: the coder would take all parts for boxes where the first has two.
        size: (H, W) of the image.

    Raises:
        InputError: what is wrong, without the file and the annotation.
    """
    from faster_coco_eval.core import mask as coder

    if isinstance(segmentation, dict):
        counts = _run_lengths(segmentation, size)
        if isinstance(counts, bytes):
            return counts
        runs = coder.frPyObjects({"size": list(size), "counts": counts}, *size)
    else:
        runs = coder.merge(coder.frPyObjects(_polygons(segmentation), *size))
    return bytes(runs["counts"])


def decode(runs: bytes, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return the pixels of compressed run lengths, (H, W); raises as `compress`."""
    from faster_coco_eval.core import mask as coder

    try:
        inside = coder.decode({"size": list(size), "counts": runs})
    except Exception as error:  # the C code raises what it likes
        raise InputError(
            "segmentation cannot be drawn: run lengths that are none of an image of "
            f"{size[1]}x{size[0]} pixels"
        ) from error
    pixels: np.ndarray[Any, np.dtype[np.bool_]] = inside.astype(bool)
    return pixels


def _run_lengths(runs: dict[str, Any], size: tuple[int, int]) -> list[int] | bytes:
    try:
        sides = [int(float(side)) for side in runs["size"]]
        counts = runs["counts"]
        numbers = [] if isinstance(counts, str) else [int(float(value)) for value in counts]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError("run lengths without a usable size or counts") from error
    if sides != list(size):
        turned = " (width and height in COCO's order)" if sides == [*size][::-1] else ""
        raise InputError(f"run lengths of size {sides}, expected {list(size)}{turned}")
    if isinstance(counts, str):
        return counts.encode()
    if min(numbers, default=0) < 0:
        raise InputError(f"run lengths with the negative number {min(numbers)}")
    if sum(numbers) != size[0] * size[1]:
        raise InputError(
            f"run lengths of {sum(numbers)} pixels, expected {size[0] * size[1]} as the image has"
        )
    return numbers


def _polygons(segmentation: Any) -> list[list[float]]:
    try:
        # What COCO itself writes needs no array; a text, a pair or a number fails in the sum.
        plain = all(math.isfinite(sum(part)) for part in segmentation)
        parts = segmentation if plain else []
        if len(parts) > 2 and all(len(part) == 2 for part in parts):
            parts = [[value for part in parts for value in part]]  # the corners of one polygon
    except (TypeError, OverflowError):
        parts = _other_polygons(segmentation)
    if not parts and segmentation:
        raise InputError("polygon with a corner that is no number")
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
    """Return polygons of pairs, of texts, or a single one."""
    try:
        arrays = [np.asarray(part, np.float64) for part in segmentation]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("segmentation that is neither polygons nor run lengths") from error
    if all(array.ndim == 0 for array in arrays):
        arrays = [np.array(arrays)]
    if any((array.ndim == 2 and array.shape[1] != 2) or array.ndim > 2 for array in arrays):
        raise InputError("polygon of corners that are no pairs of x and y")
    if not all(np.isfinite(array).all() for array in arrays):
        return []
    return [array.ravel().tolist() for array in arrays]
