"""labelme's JSON: outlines of one image, drawn as a mask."""

# H W pixels, P points

import base64
import binascii
import io
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from effseg.data.class_files import IGNORE_NAMES, LABELME_BACKGROUND
from effseg.data.classes import Classes
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError

Pixels = npt.NDArray[np.uint8]
_FAR = 1e6  # pixels


def read_labelme(path: Path, classes: Classes) -> torch.Tensor:
    """Draw the polygons, rectangles, circles and masks of a file, later ones over earlier ones.

    The result is (H, W) uint8, 0 … K-1 and 255, which is the label `__ignore__`. InputError: the
    file is missing or not labelme's, or a shape, named by its number, has no area or an unknown
    label.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        height, width = int(content["imageHeight"]), int(content["imageWidth"])
        shapes = list(content["shapes"])
        mask = np.zeros((height, width), np.uint8)
    except OSError as error:
        raise InputError(f"{path}: mask is missing") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path}: not labelme's, expected imageHeight, imageWidth and shapes"
        ) from error
    values = {name: value for value, name in enumerate(classes.names)}
    values |= dict.fromkeys(IGNORE_NAMES, IGNORE_INDEX) | dict.fromkeys(LABELME_BACKGROUND, 0)
    for number, shape in enumerate(shapes):
        where = f"{path}: shape {number}"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or label not in values:
            raise InputError(f"{where}: label {label!r}, expected {', '.join(classes.names)}")
        _draw(mask, shape, values[label], where)
    return torch.from_numpy(mask)


def _draw(mask: Pixels, shape: dict[str, Any], value: int, where: str) -> None:
    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.array(shape["points"], np.float64).reshape(-1, 2)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: points, expected pairs of numbers") from error
    needed = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}
    if not isinstance(kind, str) or kind not in needed:
        raise InputError(f"{where}: {kind}, expected one of {', '.join(needed)}")
    count = min(len(points), 3) if kind == "polygon" else len(points)
    if count != needed[kind]:
        raise InputError(f"{where}: {kind} of {len(points)} points, expected {needed[kind]}")
    if not (np.abs(points) < _FAR).all():  # nan, too; OpenCV's numbers have 32 bits
        raise InputError(f"{where}: {kind} with a point that is no number, or far outside")
    corners = np.rint(points).astype(np.int32)
    (x1, y1), (x2, y2) = points[:2].tolist()
    if kind == "polygon":
        cv2.fillPoly(mask, [corners], value)
    elif kind == "rectangle":
        cv2.rectangle(mask, corners[0].tolist(), corners[1].tolist(), value, cv2.FILLED)
    elif kind == "circle":  # the centre, and a point on the rim
        radius = round(math.hypot(x2 - x1, y2 - y1))
        cv2.circle(mask, corners[0].tolist(), radius, value, cv2.FILLED)
    else:
        inside = _decode(shape.get("mask") or shape.get("imageData"), where)
        left, top = corners.min(0).tolist()
        part = mask[max(top, 0) : top + len(inside), max(left, 0) : left + inside.shape[1]]
        inside = inside[max(-top, 0) :, max(-left, 0) :][: len(part), : part.shape[1]]
        part[inside] = value


def _decode(text: object, where: str) -> npt.NDArray[np.bool_]:
    """Return the pixels of a mask: a PNG in base64, from the first point to the second."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(str(text), validate=True)))
        return np.asarray(image.convert("L")) > 0
    except (binascii.Error, OSError, SyntaxError) as error:
        raise InputError(f"{where}: mask, expected a PNG in base64") from error
