"""Annotation files in Pascal VOC's XML."""

# N boxes

import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch

from effseg.data.classes import Classes
from effseg.data.sample import Sample
from effseg.data.sources.source import enclosing_box
from effseg.errors import InputError

Element = ElementTree.Element
_DIFFICULT = {"0": False, "1": True, "": False, "false": False, "true": True, "unspecified": False}
_OF_OBJECTS = {"object", "bndbox", "xmin", "box", "polygon"}


def read_annotation(path: Path, classes: Classes, refuse: Callable[[str], None]) -> Sample:
    """Read an annotation file; a namespace is read over.

    VOC counts pixels from 1 and includes the last one; the result counts from 0 and excludes it.

    Args:
        path: the file.
        classes: the class list, background first.
        refuse: gets a line for what is wrong with an object; if it returns, the file has no boxes.

    Returns:
        `boxes` (N, 4) float32, `labels` (N,) int64 (class index - 1), `difficult` (N,), and
        `stated_size`, unless it is missing, or 0 as tools write it that did not look.

    Raises:
        InputError: the file is missing or no VOC XML.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path}: no VOC annotation: {error}") from error
    if _tag(root) != "annotation":
        raise InputError(f"{path}: no VOC annotation: <{_tag(root)}>, expected <annotation>")
    objects = root.findall("{*}object")
    inside = {id(part) for entry in objects for part in entry.iter()}
    stray = [part for part in root.iter() if id(part) not in inside]
    for part in stray:
        if _tag(part).lower() in _OF_OBJECTS:
            raise InputError(
                f"{path}: no VOC annotation: <{_tag(part)}>, expected each object as <object> "
                "right in <annotation>"
            )
    boxes, labels, difficult = [], [], []
    problems = []
    for number, entry in enumerate(objects, start=1):
        try:
            labels.append(_label(entry, classes))
            boxes.append(_corners(entry, number))
            difficult.append(_difficult(entry, number))
        except InputError as error:
            problems.append(f"{path}: {error}")
    for problem in problems:
        refuse(problem)
    count = 0 if problems else None
    sample = Sample(
        boxes=torch.tensor(boxes[:count], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels[:count], dtype=torch.int64),
        difficult=torch.tensor(difficult[:count], dtype=torch.bool),
    )
    size = _size(root, path)
    if size is not None:
        sample["stated_size"] = size
    return sample


def _tag(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _text(element: Element, *path: str) -> str | None:
    text = element.findtext("/".join(f"{{*}}{part}" for part in path))
    return None if text is None else text.strip()


def _label(entry: Element, classes: Classes) -> int:
    name = _text(entry, "name") or ""
    if name not in classes.names[1:]:
        raise InputError(f"object {name!r}, expected one of {', '.join(classes.names[1:])}")
    return classes.names.index(name) - 1


def _corners(entry: Element, number: int) -> list[float]:
    corners = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(entry, "bndbox", key)
        try:
            corners.append(float(text or ""))
        except ValueError as error:
            problem = f"no bndbox with {key}" if text is None else f"{key} {text!r}"
            raise InputError(
                f"no VOC annotation: object {number}: {problem}, expected a number of pixels"
            ) from error
    x1, y1, x2, y2 = corners
    if max(x2, y2) < 1:
        raise InputError(
            f"object {number}: box ({x1:g}, {y1:g}, {x2:g}, {y2:g}), expected pixels from 1"
        )
    box, degrees = (x1 - 1, y1 - 1, x2, y2), _rotation(entry, number)
    return list(enclosing_box(box, degrees) if degrees else box)


def _rotation(entry: Element, number: int) -> float:
    """Return by how many degrees CVAT's box is rotated about its centre."""
    for attribute in entry.iterfind("{*}attributes/{*}attribute"):
        if _text(attribute, "name") == "rotation":
            text = _text(attribute, "value") or "0"
            try:
                if math.isfinite(degrees := float(text)):
                    return degrees
            except ValueError:
                pass
            raise InputError(f"object {number}: rotation {text!r}, expected degrees")
    return 0.0


def _difficult(entry: Element, number: int) -> bool:
    text = _text(entry, "difficult") or ""
    try:
        return _DIFFICULT[text.lower()]
    except KeyError as error:
        raise InputError(f"object {number}: difficult {text!r}, expected 0 or 1") from error


def _size(root: Element, path: Path) -> tuple[int, int] | None:
    texts = [_text(root, "size", key) for key in ("height", "width")]
    if not any(texts):
        return None
    try:
        height, width = (int(float(text or "")) for text in texts)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: size {texts[1]}x{texts[0]}, expected pixels") from error
    return (height, width) if height or width else None
