"""Values in annotation files, as tools write them: numbers and flags may be text."""

import math
from typing import Any

from effseg.errors import InputError

Corners = tuple[float, float, float, float]
"""x1 y1 x2 y2 in pixels."""

_TRUE = {"1", "1.0", "true"}
_FALSE = {"0", "0.0", "false", "none", "unspecified", ""}


def number(value: Any, key: str) -> float:
    """Return a number; InputError names the key if it is missing or something else."""
    if value is None:
        raise InputError(f"{key} is missing")
    try:
        return float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{key} {value!r:.40}, expected a number") from error


def whole(value: Any, key: str) -> int:
    """Return a whole number; raises as `number`."""
    if type(value) is int:
        return value
    result = number(value, key)
    if not result.is_integer():
        raise InputError(f"{key} {value!r}, expected a whole number")
    return int(result)


def flag(value: Any, key: str) -> bool:
    """Return a flag, False if it is missing; InputError names the key."""
    text = str(value).lower()
    if text not in _TRUE and text not in _FALSE:
        raise InputError(f"{key} {value!r:.40}, expected 0 or 1")
    return text in _TRUE


def upright(box: Corners, rotation: Any) -> Corners:
    """Return the upright box around one that CVAT rotates about its centre, by degrees or None."""
    if rotation is None:
        return box
    degrees = number(rotation, "rotation")
    if not math.isfinite(degrees):
        raise InputError(f"rotation {rotation!r}, expected degrees")
    x1, y1, x2, y2 = box
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width, height = (x2 - x1) * cos + (y2 - y1) * sin, (x2 - x1) * sin + (y2 - y1) * cos
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
