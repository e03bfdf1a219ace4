"""Annotation files in Pascal VOC's XML."""

# N boxes

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch

from effseg.data.classes import Classes
from effseg.data.sample import Sample
from effseg.data.sources.fields import Corners, flag, number, upright, whole
from effseg.errors import InputError

Element = ElementTree.Element
_OF_OBJECTS = {"object", "bndbox", "xmin", "box", "polygon"}


def read_annotation(path: Path, classes: Classes, refuse: Callable[[str], None]) -> Sample:
    """Read an annotation file; a namespace is ignored.

    VOC counts pixels from 1 and includes the last one; the result counts from 0 and excludes it.
    `refuse` receives a line for each invalid object; if it returns, the file has no boxes. The
    sample has `boxes`, `labels`, `difficult`, and `stated_size`, unless it is missing, or 0 as
    tools write it that do not know it. InputError: the file is missing or no VOC XML.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path}: no VOC annotation: {error}") from error
    if _tag(root) != "annotation":
        raise InputError(f"{path}: no VOC annotation: <{_tag(root)}>, expected <annotation>")
    objects = root.findall("{*}object")
    inside = {part for entry in objects for part in entry.iter()}
    for part in root.iter():
        if part not in inside and _tag(part).lower() in _OF_OBJECTS:
            raise InputError(
                f"{path}: no VOC annotation: <{_tag(part)}>, expected each object as <object> "
                "directly in <annotation>"
            )
    names, read = classes.names[1:], list[tuple[Corners, int, bool]]()
    for position, entry in enumerate(objects, start=1):
        try:
            name, difficult = _text(entry, "name") or "", _text(entry, "difficult")
            if name not in names:
                raise InputError(f"class {name!r}, expected one of {', '.join(names)}")
            read.append((_corners(entry), names.index(name), flag(difficult, "difficult")))
        except InputError as error:
            refuse(f"{path}: object {position}: {error}")
    if len(read) < len(objects):
        read = []
    sample = Sample(
        boxes=torch.tensor([box for box, _, _ in read], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label, _ in read], dtype=torch.int64),
        difficult=torch.tensor([difficult for *_, difficult in read], dtype=torch.bool),
    )
    try:
        height, width = (whole(_text(root, f"size/{k}") or 0, k) for k in ("height", "width"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if height or width:
        sample["stated_size"] = height, width
    return sample


def _tag(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _text(element: Element, path: str) -> str | None:
    text = element.findtext("/".join(f"{{*}}{part}" for part in path.split("/")))
    return None if text is None else text.strip()


def _corners(entry: Element) -> Corners:
    keys = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (number(_text(entry, f"bndbox/{key}"), f"bndbox/{key}") for key in keys)
    if max(x2, y2) < 1:
        raise InputError(f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g}), expected pixels from 1")
    rotation = None
    for attribute in entry.iterfind("{*}attributes/{*}attribute"):
        if _text(attribute, "name") == "rotation":
            rotation = _text(attribute, "value") or None
    return upright((x1 - 1, y1 - 1, x2, y2), rotation)
