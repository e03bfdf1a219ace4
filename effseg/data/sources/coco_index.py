"""COCO's annotation file as arrays: read piece by piece, once a file, shared by all who ask."""

# H W pixels, S images, A annotations. The objects of an image lie side by side.

import math
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from effseg.data.sources.coco_fields import (
    box,
    flag,
    number,
    number_or,
    rotation,
    side,
    text_or_number,
    whole,
)
from effseg.data.sources.coco_json import entries
from effseg.data.sources.coco_masks import compress
from effseg.data.sources.source import enclosing_box
from effseg.errors import InputError

Array = npt.NDArray[Any]

_KEYS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoIndex:
    """An annotation file. Images are in the order of their ids, annotations in that of the file.

    Nothing in it is a Python object an annotation: worker processes share its memory.
    """

    path: Path
    categories: dict[int, str]
    unused: frozenset[int]
    """Categories that no annotation has."""
    parents: dict[int, str]
    """The supercategory of each category, empty without one."""
    image_ids: Array
    """(S,) int64, or texts where one of them is no number."""
    files: Array
    """(S,) file names."""
    sizes: npt.NDArray[np.int32]
    """(S, 2) H, W."""
    first: npt.NDArray[np.int64]
    """(S + 1,): image `i` has the annotations `first[i]` to `first[i + 1]`."""
    ids: npt.NDArray[np.int64]
    """(A,); what has no number is counted from -1 down."""
    category_ids: npt.NDArray[np.int64]
    """(A,)."""
    boxes: npt.NDArray[np.float32]
    """(A, 4) x1 y1 x2 y2, as they stand there."""
    areas: npt.NDArray[np.float32]
    """(A,) pixels; the box's where the file has none."""
    crowds: npt.NDArray[np.bool_]
    """(A,)."""
    rle: npt.NDArray[np.uint8]
    """COCO's compressed run lengths of all annotations, one after the other."""
    rle_spans: npt.NDArray[np.int64]
    """(A, 2) start and end of each in `rle`; one that cannot be drawn has none."""
    segmented: bool
    """Whether any annotation has a segmentation, one that can be drawn or not."""

    faults: tuple[str, ...]
    """What is wrong with the file, a line each."""
    image_faults: dict[int, list[str]]
    """What is wrong with the annotations of an image; those are not in the arrays."""
    undrawable: dict[int, str]
    """Why an annotation of the arrays has no run lengths, where it has a segmentation."""

    def objects(self, index: int) -> slice:
        """Return the place of an image's annotations."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def run_lengths(self, annotation: int) -> bytes:
        """Return the compressed run lengths of an annotation; empty: it cannot be drawn."""
        start, end = self.rle_spans[annotation].tolist()
        return self.rle[start:end].tobytes()

    def name(self, annotation: int) -> str:
        """Return what to call an annotation in an error."""
        return f"{self.path}: {_name(int(self.ids[annotation]))}"

    def why_not_drawn(self, annotation: int) -> str:
        """Return why an annotation has no run lengths."""
        missing = "there is none, expected polygons or run lengths (masks: null needs none)"
        return f"segmentation cannot be drawn: {self.undrawable.get(annotation, missing)}"


def read_index(path: Path, masks: bool) -> CocoIndex:
    """Read an annotation file, unless it was read before.

    Args:
        path: COCO's instance JSON.
        masks: keep the segmentations (a file of boxes and polygons takes twice as long).

    Raises:
        InputError: the file is missing, cut off, or not in COCO's instance format.
    """
    try:
        stamp = path.stat()
    except OSError as error:
        raise InputError(f"{path}: no such file, expected COCO's annotations") from error
    return _read(path.resolve(), stamp.st_mtime_ns, stamp.st_size, masks)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, length: int, masks: bool) -> CocoIndex:
    reader = _Reader(path, masks)
    later, seen = False, set[str]()
    for key, entry in entries(path, _KEYS, seen):
        # Polygons need the image's size: annotations before the images wait for a second reading.
        if key == "annotations" and not reader.images:
            later = True
        else:
            reader.take(key, entry)
    if later:
        for key, entry in entries(path, _KEYS, seen):
            if key == "annotations":
                reader.take(key, entry)
    return reader.index("annotations" in seen)


@dataclass(frozen=True)
class _Image:
    row: int
    file: str
    size: tuple[int, int]


class _Reader:
    """Collects the entries of a file in flat arrays, and what is wrong with them."""

    def __init__(self, path: Path, masks: bool) -> None:
        self.path, self.masks = path, masks
        self.images: dict[int | str, _Image | None] = {}  # None: its entry cannot be used
        self.files: dict[str, int | str] = {}
        self.categories: dict[int, str] = {}
        self.parents: dict[int, str] = {}
        self.ids, self.rows, self.category_ids = array("q"), array("q"), array("q")
        self.boxes, self.areas, self.crowds = array("f"), array("f"), array("b")
        self.rle, self.rle_ends = bytearray(), array("q")
        self.segmented, self.count, self.over = False, 0, 0
        self.faults: list[str] = []
        self.image_faults: dict[int, list[str]] = {}
        self.undrawable: dict[int, str] = {}

    def take(self, key: str, entry: Any) -> None:
        """Add an entry, or note what is wrong with it."""
        if key == "annotations":
            self._annotation(entry)
            return
        try:
            if not isinstance(entry, dict):
                raise InputError(f"{entry!r:.40}, expected an object")
            if key == "images":
                self._image(entry)
            else:
                self._category(entry)
        except InputError as error:
            self.faults.append(f"{self.path}: {key}: {error}")

    def _image(self, entry: dict[str, Any]) -> None:
        key = text_or_number(entry, "id")
        before = self.images.get(key)
        if key in self.images:
            first = f" ({before.file}, {entry.get('file_name')})" if before else ""
            raise InputError(f"image id {key} comes twice{first}")
        self.images[key] = None
        try:
            size = side(entry, "height"), side(entry, "width")
            file = entry.get("file_name")
            if not isinstance(file, str) or not file:
                raise InputError(f"file_name {file!r}, expected the name of a file")
            file = file.replace("\\", "/")  # of writers on Windows
            if file in self.files:
                raise InputError(f"file_name {file} is that of image {self.files[file]} too")
        except InputError as error:
            raise InputError(f"image {key}: {error}") from None
        self.files[file] = key
        self.images[key] = _Image(len(self.files) - 1, file, size)

    def _category(self, entry: dict[str, Any]) -> None:
        key, name = whole(entry, "id"), entry.get("name")
        if not isinstance(name, str | int) or name == "":
            raise InputError(f"category {key}: name {name!r}, expected a name")
        if key in self.categories:
            raise InputError(f"category id {key} comes twice ({self.categories[key]}, {name})")
        self.categories[key] = str(name).strip()
        self.parents[key] = str(entry.get("supercategory") or "").strip()

    def _annotation(self, entry: Any) -> None:
        self.count += 1
        name, image = -self.count, None
        try:
            if not isinstance(entry, dict):
                raise InputError(f"{entry!r:.40}, expected an object")
            if isinstance(entry.get("id"), int | str):
                name = number_or(entry["id"], name)
            key = text_or_number(entry, "image_id")
            if key not in self.images:
                raise InputError(f"image_id {key} is not in images")
            image = self.images[key]
            if image is not None:
                self._add(name, image, entry)
        except InputError as error:
            line = f"{self.path}: {_name(name)}: {error}"
            if image is None:
                self.faults.append(line)
            else:
                self.image_faults.setdefault(image.row, []).append(line)

    def _add(self, name: int, image: _Image, entry: dict[str, Any]) -> None:
        category, crowd = whole(entry, "category_id"), flag(entry, "iscrowd")
        segmentation = entry.get("segmentation")
        if isinstance(segmentation, list) and not any(segmentation):
            segmentation = None  # [], [[]]: no segmentation
        runs, reason = b"", ""
        if segmentation and (self.masks or not entry.get("bbox")):
            try:
                runs = compress(segmentation, image.size)
            except InputError as error:
                reason = str(error)
        x, y, width, height = box(entry, runs, image.size)
        degrees = 0.0 if segmentation else rotation(entry)
        area = width * height if entry.get("area") is None else number(entry, "area")
        if not area >= 0 or area == math.inf:
            raise InputError(f"area {area:g}, expected a number of pixels, or null")
        self.over += x + width > image.size[1] + 1 or y + height > image.size[0] + 1
        corners = (x, y, x + width, y + height)
        if self.masks:
            self.segmented |= bool(segmentation)
            self.rle += runs
            if reason:
                self.undrawable[len(self.ids)] = reason
        self.ids.append(name)
        self.rows.append(image.row)
        self.category_ids.append(category)
        self.boxes.extend(enclosing_box(corners, degrees) if degrees else corners)
        self.areas.append(area)
        self.crowds.append(crowd)
        self.rle_ends.append(len(self.rle))

    def index(self, annotated: bool) -> CocoIndex:
        """Put the annotations of an image side by side; raises as `read_index`."""
        required = (
            ("images", bool(self.images)),
            ("categories", bool(self.categories)),
            ("annotations", annotated),
        )
        for key, known in required:
            if not known and not self.faults:
                raise InputError(f"{self.path}: {key} is empty or missing, expected COCO's list")
        images = sorted(
            ((number, image) for number, image in self.images.items() if image is not None),
            key=lambda row: (isinstance(row[0], str), row[0]),
        )
        rank = np.argsort(np.array([image.row for _, image in images], np.int64))
        owner = rank[np.frombuffer(self.rows, np.int64)]
        order = np.argsort(owner, kind="stable")
        new_row = np.argsort(order)
        first = np.searchsorted(owner[order], np.arange(len(images) + 1))
        ends = np.frombuffer(self.rle_ends, np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1) if len(ends) else ends
        boxes = np.frombuffer(self.boxes, np.float32).reshape(-1, 4)
        self._check_boxes(boxes)
        category_ids = np.frombuffer(self.category_ids, np.int64)
        return CocoIndex(
            path=self.path,
            categories=dict(sorted(self.categories.items())),
            unused=frozenset(self.categories.keys() - set(np.unique(category_ids).tolist())),
            parents=self.parents,
            image_ids=np.array([number for number, _ in images]),
            files=np.array([image.file for _, image in images]),
            sizes=np.array([image.size for _, image in images], np.int32).reshape(-1, 2),
            first=first.astype(np.int64),
            ids=np.frombuffer(self.ids, np.int64)[order],
            category_ids=category_ids[order],
            boxes=boxes[order],
            areas=np.frombuffer(self.areas, np.float32)[order],
            crowds=np.frombuffer(self.crowds, np.int8)[order] != 0,
            rle=np.frombuffer(self.rle, np.uint8),
            rle_spans=spans.reshape(-1, 2)[order],
            segmented=self.segmented,
            faults=tuple(self.faults),
            image_faults={int(rank[old]): lines for old, lines in self.image_faults.items()},
            undrawable={int(new_row[old]): why for old, why in self.undrawable.items()},
        )

    def _check_boxes(self, boxes: Array) -> None:
        """Note boxes that are meant otherwise: each would pass for a box."""
        form = "expected x, y, width, height in pixels"
        if len(boxes) and (boxes >= 0).all() and (boxes <= 1).all():
            self.faults.append(f"{self.path}: no bbox reaches beyond 1: shares of an image, {form}")
        if len(boxes) >= 20 and 2 * self.over > len(boxes):
            self.faults.append(
                f"{self.path}: {self.over} of {len(boxes)} bboxes reach over the edge of their "
                f"image: two corners, {form}"
            )


def _name(number: int) -> str:
    return f"annotation {number}" if number >= 0 else f"annotation without an id, entry {-number}"
