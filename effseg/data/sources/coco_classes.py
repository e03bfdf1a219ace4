"""Class lists of COCO's format: COCO's, with and without gaps, VOC's, and the file's."""

# A annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effseg.data.classes import Classes, coco_categories
from effseg.data.sources.coco_index import CocoIndex
from effseg.errors import InputError

CARD = "coco2017"


@dataclass(frozen=True)
class ClassList:
    """A class list, and the labels of a file's annotations in it, 0 … K-2 without background."""

    kind: str
    classes: Classes
    label_of: dict[int, int]
    """The label of each category."""
    labels: npt.NDArray[np.int64]
    """(A,); -1: the category is not in the list."""


def class_list(kind: str, index: CocoIndex) -> ClassList:
    """Return the list `file`, `voc21`, `coco80` or `coco90`; `auto` is `coco80` or `file`."""
    coco, voc = coco_categories()
    if kind == "auto":
        kind = "coco80" if index.categories.items() <= coco.items() else "file"
    if kind == "file":
        names = _file_names(index)
        classes = Classes.from_names(["background", *dict.fromkeys(names.values())])
    else:
        _check_names(index)
        names = voc if kind == "voc21" else coco
        classes = Classes.from_card("voc2012" if kind == "voc21" else CARD)
    if kind == "coco90":
        numbers = range(1, max(names) + 1)
        classes = Classes.from_names(["background", *(names.get(i, f"id {i}") for i in numbers)])
    label_of = {category: classes.names.index(name) - 1 for category, name in names.items()}
    categories, inverse = np.unique(index.annotations["category"], return_inverse=True)
    labels = np.array([label_of.get(category, -1) for category in categories.tolist()], np.int64)
    return ClassList(kind, classes, label_of, labels[inverse])


def _check_names(index: CocoIndex) -> None:
    coco, _ = coco_categories()
    for category, name in index.categories.items():
        expected = coco.get(category)
        if name != expected:
            raise InputError(
                f"{index.path}: category {category} is {name!r}, expected {expected!r} as in COCO "
                '("file" takes the categories as they are)'
            )


def _file_names(index: CocoIndex) -> dict[int, str]:
    """Return the categories that are classes.

    A background is not one, nor is the empty parent that Roboflow writes above all others.
    """
    used = set(np.unique(index.annotations["category"]).tolist())
    names = {c: n for c, n in index.categories.items() if n.lower().strip("_ ") != "background"}
    for category, name in names.items():
        other_parents = {index.parents[c] for c in names if c != category}
        is_root = index.parents[category] in ("", "none") and other_parents == {name}
        if is_root and category not in used:
            del names[category]
            break
    category_of: dict[str, int] = {}
    for category in sorted(names.keys() & used):
        name = names[category]
        if name in category_of:
            raise InputError(
                f"{index.path}: categories {category_of[name]} and {category} are both named "
                f"{name!r}, expected distinct names"
            )
        category_of[name] = category
    return names
