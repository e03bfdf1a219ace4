"""COCO's annotation file as arrays: read in pieces, once a file, and shared by all sources."""

# H W pixels, S images, A annotations. The annotations of an image are consecutive rows.

import math
import re
import struct
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from effseg.data.sources.coco_json import entries
from effseg.data.sources.coco_masks import bounding_box, compress
from effseg.data.sources.fields import flag, number, upright, whole
from effseg.errors import InputError

Array = npt.NDArray[Any]

_KEYS = ("images", "annotations", "categories")

ANNOTATION = np.dtype(
    [
        ("id", "i8"),  # entries without an id count from -1 down
        ("image", "i8"),  # row of the image
        ("category", "i8"),
        ("box", "f4", 4),  # x1 y1 x2 y2, not clipped
        ("area", "f4"),  # pixels; the box's if the file has none
        ("crowd", "i4"),  # 0 or 1
        ("rle", "i8", 2),  # start and end of its run lengths in `CocoIndex.rle`
    ]
)
_pack = struct.Struct("=3q5fi2q").pack


@dataclass(frozen=True)
class CocoIndex:
    """An annotation file. Images are in the order of their ids.

    Arrays, not a Python object for each annotation: worker processes share their memory where they
    are forked, and are sent little where they are spawned.
    """

    path: Path
    categories: dict[int, str]  # names, in the order of the ids
    parents: dict[int, str]  # the supercategory of each category, or ""
    image_ids: Array  # (S,) text
    files: Array  # (S,) file names
    sizes: npt.NDArray[np.int32]  # (S, 2) H, W
    first: npt.NDArray[np.int64]  # (S + 1,): image i has the rows first[i] to first[i + 1]
    annotations: Array  # (A,) of ANNOTATION
    rle: npt.NDArray[np.uint8]  # compressed run lengths of all annotations, concatenated
    segmented: bool  # whether any annotation has a segmentation, valid or not
    faults: list[str]  # problems with the file, a line each
    image_faults: dict[str, list[str]]  # with annotations, by image id; these have no row

    def rows(self, image: int) -> slice:
        """Return the rows of an image."""
        return slice(int(self.first[image]), int(self.first[image + 1]))

    def run_lengths(self, row: int) -> bytes:
        """Return the run lengths of an annotation, empty if it has no segmentation."""
        start, end = self.annotations["rle"][row].tolist()
        return self.rle[start:end].tobytes()

    def name(self, row: int) -> str:
        """Return the name of an annotation in error messages."""
        return f"{self.path}: {_name(int(self.annotations['id'][row]))}"


def read_index(path: Path, masks: bool) -> CocoIndex:
    """Read COCO's instance JSON, once a file; without `masks` in half the time.

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
            reader.add(key, entry)
    for key, entry in entries(path, ("annotations",), seen) if later else ():
        reader.add(key, entry)
    return reader.index("annotations" in seen)


class _Image(NamedTuple):
    row: int
    file: str
    size: tuple[int, int]


class _Reader:
    """Collects the entries of a file, and the problems with them."""

    def __init__(self, path: Path, masks: bool) -> None:
        self.path, self.masks = path, masks
        self.images: dict[int | str, _Image | None] = {}  # by id; None: unusable entry
        self.files: dict[str, int | str] = {}
        self.categories: dict[int, str] = {}
        self.parents: dict[int, str] = {}
        self.annotations, self.rle = bytearray(), bytearray()
        self.count = 0
        self.faults: list[str] = []
        self.image_faults = defaultdict[str, list[str]](list)
        self.segmented = False

    def add(self, key: str, entry: Any) -> None:
        """Add an entry, or note what is wrong with it."""
        name, owner = key, None
        try:
            if key == "annotations":
                self.count += 1
                annotation_id = _annotation_id(entry, -self.count)
                name = _name(annotation_id)
            if not isinstance(entry, dict):
                raise InputError(f"{entry!r:.40}, expected an object")
            if key == "images":
                self._image(entry)
            elif key == "categories":
                self._category(entry)
            else:
                image_id = _identifier(entry.get("image_id"), "image_id")
                if image_id not in self.images:
                    raise InputError(f"image_id {image_id} is not in images")
                image = self.images[image_id]
                if image is not None:
                    owner = str(image_id)
                    self._annotation(annotation_id, image, entry)
        except InputError as error:
            faults = self.faults if owner is None else self.image_faults[owner]
            faults.append(f"{self.path}: {name}: {error}")

    def _image(self, entry: dict[str, Any]) -> None:
        image_id = _identifier(entry.get("id"), "id")
        file = entry.get("file_name")
        if image_id in self.images:
            before = self.images[image_id]
            files = f" ({before.file}, {file})" if before else ""
            raise InputError(f"image id {image_id} comes twice{files}")
        self.images[image_id] = None
        try:
            size = _side(entry, "height"), _side(entry, "width")
            if not isinstance(file, str) or not file:
                raise InputError(f"file_name {file!r}, expected the name of a file")
            file = file.replace("\\", "/")  # of writers on Windows
            if file in self.files:
                raise InputError(f"file_name {file} is that of image {self.files[file]} too")
        except InputError as error:
            raise InputError(f"image {image_id}: {error}") from None
        self.images[image_id] = _Image(len(self.files), file, size)
        self.files[file] = image_id

    def _category(self, entry: dict[str, Any]) -> None:
        category, name = whole(entry.get("id"), "id"), entry.get("name")
        if not isinstance(name, str | int) or name == "":
            raise InputError(f"category {category}: name {name!r}, expected a name")
        if category in self.categories:
            first = self.categories[category]
            raise InputError(f"category id {category} comes twice ({first}, {name})")
        self.categories[category] = str(name).strip()
        self.parents[category] = str(entry.get("supercategory") or "").strip()

    def _annotation(self, annotation_id: int, image: _Image, entry: dict[str, Any]) -> None:
        category = whole(entry.get("category_id"), "category_id")
        crowd = flag(entry.get("iscrowd"), "iscrowd")
        segmentation, attributes = entry.get("segmentation"), entry.get("attributes")
        if isinstance(segmentation, list) and not any(segmentation):
            segmentation = None  # [], [[]]: no segmentation
        runs = b""
        if segmentation and (self.masks or not entry.get("bbox")):
            self.segmented = True
            try:
                runs = compress(segmentation, image.size)
            except InputError as error:
                raise InputError(f"segmentation cannot be drawn: {error}") from None
        x, y, width, height = bounding_box(entry.get("bbox"), runs, image.size)
        area = entry.get("area")
        area = width * height if area is None else number(area, "area")
        if not 0 <= area < math.inf:
            raise InputError(f"area {area:g}, expected a number of pixels, or null")
        box = (x, y, x + width, y + height)
        if isinstance(attributes, dict) and not segmentation:  # a segmentation is rotated already
            box = upright(box, attributes.get("rotation"))
        rle = len(self.rle), len(self.rle) + len(runs)
        try:
            record = _pack(annotation_id, image.row, category, *box, area, crowd, *rle)
        except (struct.error, OverflowError) as error:
            raise InputError(
                "id, category_id, bbox or area is too large, expected pixels"
            ) from error
        self.annotations += record
        self.rle += runs

    def index(self, annotated: bool) -> CocoIndex:
        """Make the arrays; raises as `read_index`."""
        lists = {"images": self.images, "categories": self.categories, "annotations": annotated}
        missing = [key for key, present in lists.items() if not present]
        if missing and not self.faults:
            raise InputError(f"{self.path}: {missing[0]} is empty or missing, expected COCO's list")
        usable = [(image_id, image) for image_id, image in self.images.items() if image]
        usable.sort(key=lambda pair: (isinstance(pair[0], str), pair[0]))
        sizes = np.array([image.size for _, image in usable], np.int32).reshape(-1, 2)
        new_row = np.argsort(np.array([image.row for _, image in usable], np.int64))
        table = np.frombuffer(self.annotations, ANNOTATION)
        table["image"] = new_row[table["image"]]
        self._check_boxes(table["box"], sizes[table["image"]])
        table = table[np.argsort(table["image"], kind="stable")]
        return CocoIndex(
            path=self.path,
            categories=dict(sorted(self.categories.items())),
            parents=self.parents,
            image_ids=np.array([str(image_id) for image_id, _ in usable]),
            files=np.array([image.file for _, image in usable]),
            sizes=sizes,
            first=np.searchsorted(table["image"], np.arange(len(usable) + 1)),
            annotations=table,
            rle=np.frombuffer(self.rle, np.uint8),
            faults=self.faults,
            image_faults=dict(self.image_faults),
            segmented=self.segmented,
        )

    def _check_boxes(self, boxes: Array, sizes: Array) -> None:
        """Note boxes of another form: each of them would pass for a box."""
        form = "expected x, y, width, height in pixels"
        if len(boxes) and (boxes >= 0).all() and (boxes <= 1).all():
            self.faults.append(f"{self.path}: no bbox reaches beyond 1: shares of an image, {form}")
        over = int((boxes[:, 2:] > sizes[:, ::-1] + 1).any(1).sum())
        if len(boxes) >= 20 and 2 * over > len(boxes):
            self.faults.append(
                f"{self.path}: {over} of {len(boxes)} bboxes reach over the edge of their "
                f"image: two corners, {form}"
            )


def _name(number: int) -> str:
    return f"annotation {number}" if number >= 0 else f"annotation without an id, entry {-number}"


def _annotation_id(entry: Any, default: int) -> int:
    try:
        return int(entry["id"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return default


def _identifier(value: Any, key: str) -> int | str:
    """Return an id: a number, also if it is written as text, or text; InputError names the key."""
    if isinstance(value, str) and value:
        return int(value) if re.fullmatch("0|-?[1-9][0-9]*", value) else value
    return whole(value, key)


def _side(entry: dict[str, Any], key: str) -> int:
    pixels = whole(entry.get(key), key)
    if not 0 < pixels < 1 << 20:
        raise InputError(f"{key} {pixels}, expected pixels of the image")
    return pixels
