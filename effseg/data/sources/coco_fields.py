"""The fields of an entry of COCO's format, from writers who take its numbers lightly."""

import math
from typing import Any

from effseg.errors import InputError

_FLAGS = {"0": False, "1": True, "false": False, "true": True, "none": False, "": False}


def text_or_number(entry: dict[str, Any], key: str) -> int | str:
    """Return an id: a number where it is one, also as text, else the text."""
    value = entry.get(key)
    if type(value) is int:
        return value
    if isinstance(value, str) and value and str(number_or(value, -1)) != value:
        return value
    return whole(entry, key)


def number_or(value: int | str, default: int) -> int:
    """Return a number, else `other`."""
    try:
        return int(value)
    except ValueError:
        return default


def whole(entry: dict[str, Any], key: str) -> int:
    """Return a whole number, also from a text or a float; raises InputError."""
    value = entry.get(key)
    if type(value) is int:
        return value
    result = number(entry, key)
    if not result.is_integer():
        raise InputError(f"{key} {value!r}, expected a whole number")
    return int(result)


def side(entry: dict[str, Any], key: str) -> int:
    """Return a side of an image in pixels; raises InputError."""
    pixels = whole(entry, key)
    if not 0 < pixels < 1 << 20:
        raise InputError(f"{key} {pixels}, expected pixels of the image")
    return pixels


def number(entry: dict[str, Any], key: str) -> float:
    """Return a number, also from a text; raises InputError."""
    value = entry.get(key)
    if type(value) is float:
        return value
    try:
        return float("" if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        if value is None:
            raise InputError(f"{key} is missing") from error
        raise InputError(f"{key} {value!r:.40}, expected a number") from error


def flag(entry: dict[str, Any], key: str) -> bool:
    """Return yes or no, also from a text; no where it is missing; raises InputError."""
    value = entry.get(key)
    if value == 0 or value == 1:
        return bool(value)
    try:
        return _FLAGS[str(value).lower()]
    except KeyError as error:
        raise InputError(f"{key} {value!r:.40}, expected 0 or 1") from error


def rotation(entry: dict[str, Any]) -> float:
    """Return by how many degrees CVAT's box is rotated about its centre; raises InputError."""
    attributes = entry.get("attributes")
    if not isinstance(attributes, dict) or "rotation" not in attributes:
        return 0.0
    degrees = number(attributes, "rotation")
    if not math.isfinite(degrees):
        raise InputError(f"rotation {degrees}, expected degrees")
    return degrees


def box(entry: dict[str, Any], runs: bytes, size: tuple[int, int]) -> list[float]:
    """Return x, y, width, height, of the segmentation where there is no box; raises InputError."""
    bbox = entry.get("bbox")
    try:
        if not bbox and runs:
            from faster_coco_eval.core import mask as coder

            bbox = coder.toBbox({"size": list(size), "counts": runs})
        x, y, width, height = map(float, bbox)  # type: ignore[arg-type]
    except Exception as error:  # the C code raises what it likes
        bbox = f"bbox {bbox!r:.60}" if bbox else "no bbox"
        raise InputError(f"{bbox}, expected x, y, width, height") from error
    return [x, y, width, height]
