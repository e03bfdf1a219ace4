"""COCO's annotation file as arrays: read piece by piece, once a file, shared by all who ask."""

# H W pixels, S images, A annotations. The objects of an image lie side by side.

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from effseg.errors import InputError

Array = npt.NDArray[Any]

_KEYS = ("images", "annotations", "categories")
_CHUNK = 1 << 20  # characters


@dataclass(frozen=True)
class CocoIndex:
    """An annotation file. Images are in the order of their ids, annotations in that of the file.

    Nothing in it is a Python object an annotation: worker processes share its memory.
    """

    path: Path
    categories: dict[int, str]
    image_ids: npt.NDArray[np.int64]
    """(S,)."""
    files: Array
    """(S,) file names."""
    sizes: npt.NDArray[np.int32]
    """(S, 2) H, W."""
    first: npt.NDArray[np.int64]
    """(S + 1,): image ``i`` has the annotations ``first[i]`` to ``first[i + 1]``."""
    ids: npt.NDArray[np.int64]
    """(A,)."""
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
    """(A, 2) start and end of each in ``rle``; one that cannot be drawn has none."""

    segmented: bool
    """Whether any annotation has a segmentation, one that can be drawn or not."""

    def objects(self, index: int) -> slice:
        """Return the place of an image's annotations."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def run_lengths(self, annotation: int) -> bytes:
        """Return the compressed run lengths of an annotation; empty: it cannot be drawn."""
        start, end = self.rle_spans[annotation].tolist()
        return self.rle[start:end].tobytes()


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
    later = False
    for key, entry in _entries(path):
        # Polygons need the image's size: annotations before the images wait for a second reading.
        if key == "annotations" and not reader.images:
            later = True
        else:
            reader.take(key, entry)
    if later:
        for key, entry in _entries(path):
            if key == "annotations":
                reader.take(key, entry)
    return reader.index()


class _Reader:
    """Collects the entries of a file in flat arrays."""

    def __init__(self, path: Path, masks: bool) -> None:
        self.path, self.masks = path, masks
        self.images: dict[int, tuple[str, int, int]] = {}
        self.categories: dict[int, str] = {}
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.boxes, self.areas, self.crowds = array("f"), array("f"), array("b")
        self.rle, self.rle_ends = bytearray(), array("q")
        self.segmented = False

    def take(self, key: str, entry: Any) -> None:
        """Add an entry; raises as :func:`read_index`."""
        try:
            if key == "images":
                number = int(entry["id"])
                if number in self.images:
                    raise InputError(f"{self.path}: image id {number} comes twice")
                size = int(entry["height"]), int(entry["width"])
                self.images[number] = (str(entry["file_name"]), *size)
            elif key == "categories":
                self.categories[int(entry["id"])] = str(entry["name"])
            else:
                self._annotation(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path}: {key}: {type(error).__name__} {error}, expected COCO's instance "
                "format"
            ) from error

    def _annotation(self, entry: Any) -> None:
        number, image = int(entry.get("id", -1)), int(entry["image_id"])
        box, category = entry["bbox"], int(entry["category_id"])
        if len(box) != 4:
            raise InputError(
                f"{self.path}: annotation {number}: bbox {box}, expected x, y, width, height"
            )
        if image not in self.images:
            raise InputError(f"{self.path}: annotation {number}: image_id {image} is not in images")
        x, y, width, height = (float(value) for value in box)
        area = entry.get("area")
        self.ids.append(number)
        self.image_ids.append(image)
        self.category_ids.append(category)
        self.boxes.extend((x, y, x + width, y + height))
        self.areas.append(width * height if area is None else float(area))
        self.crowds.append(int(entry.get("iscrowd") or 0) != 0)
        segmentation = entry.get("segmentation")
        if self.masks and segmentation and segmentation != [[]]:
            self.segmented = True
            self.rle += _compress(segmentation, self.images[image][1:])
        self.rle_ends.append(len(self.rle))

    def index(self) -> CocoIndex:
        """Put the annotations of an image side by side."""
        for key, found in (("images", self.images), ("categories", self.categories)):
            if not found:
                raise InputError(f"{self.path}: {key} is empty or missing, expected at least one")
        image_ids = np.array(sorted(self.images), np.int64)
        rows = [self.images[number] for number in image_ids.tolist()]
        owner = np.searchsorted(image_ids, np.frombuffer(self.image_ids, np.int64))
        order = np.argsort(owner, kind="stable")
        first = np.searchsorted(owner[order], np.arange(len(rows) + 1))
        ends = np.frombuffer(self.rle_ends, np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1) if len(ends) else ends
        return CocoIndex(
            path=self.path,
            categories=dict(sorted(self.categories.items())),
            image_ids=image_ids,
            files=np.array([row[0] for row in rows]),
            sizes=np.array([row[1:] for row in rows], np.int32),
            first=first.astype(np.int64),
            ids=np.frombuffer(self.ids, np.int64)[order],
            category_ids=np.frombuffer(self.category_ids, np.int64)[order],
            boxes=np.frombuffer(self.boxes, np.float32).reshape(-1, 4)[order],
            areas=np.frombuffer(self.areas, np.float32)[order],
            crowds=np.frombuffer(self.crowds, np.int8)[order] != 0,
            rle=np.frombuffer(self.rle, np.uint8),
            rle_spans=spans.reshape(-1, 2)[order],
            segmented=self.segmented,
        )


def _compress(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Return COCO's compressed run lengths of polygons or of runs; empty: nothing can be drawn."""
    from faster_coco_eval.core import mask as coder

    try:
        if isinstance(segmentation, dict):
            if [int(side) for side in segmentation["size"]] != list(size):
                return b""
            counts = segmentation["counts"]
            if isinstance(counts, str):
                return counts.encode()
            runs = coder.frPyObjects(segmentation, *size)
        else:
            # A first part of 4 numbers would make the coder take all parts for boxes; what has
            # fewer than 3 corners has no area.
            parts = [part for part in segmentation if len(part) >= 6]
            if not parts or any(len(part) % 2 for part in parts):
                return b""
            runs = coder.merge(coder.frPyObjects(parts, *size))
        return bytes(runs["counts"])
    except Exception:  # the C code raises what it likes; whoever draws it names the annotation
        return b""


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, entry) of the lists in a JSON object, with a piece of the file in memory."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Text(file).entries()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON (cut off?): {error}") from error


class _Text:
    """A JSON text of which only a window is in memory."""

    def __init__(self, file: Any) -> None:
        self.file, self.text, self.at = file, "", 0
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on; the window at least doubles, so that a large value is not scanned too often."""
        rest = self.text[self.at :]
        new = self.file.read(max(_CHUNK, len(rest)))
        self.text, self.at = rest + new, 0
        return bool(new)

    def _peek(self) -> str:
        """Go to the next character that is no space, and return it; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _take(self, expected: str) -> str:
        found = self._peek()
        if not found or found not in expected:
            raise json.JSONDecodeError(f"expected {' or '.join(expected)}", self.text, self.at)
        self.at += 1
        return found

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end == len(self.text) and isinstance(value, int | float) and self._more():
                continue  # the number may go on
            self.at = end if end < len(self.text) else len(self.text)
            return value

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield (key, entry) of every list that is wanted; other values are read over."""
        self._take("{")
        if self._peek() == "}":
            return
        while True:
            key = self._value()
            self._take(":")
            if key in _KEYS and self._peek() == "[":
                self._take("[")
                if self._peek() == "]":
                    self._take("]")
                else:
                    yield key, self._value()
                    while self._take(",]") == ",":
                        yield key, self._value()
            else:
                self._value()
            if self._take(",}") == "}":
                return
