"""COCO 2017, and data of one's own in its format: boxes, and masks drawn from the instances."""

# H W pixels, N boxes, S images

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from effseg import resources
from effseg.data.classes import Classes
from effseg.data.files import look_for
from effseg.data.sample import IGNORE_INDEX, Sample, TaskName
from effseg.data.sources.coco_index import CocoIndex, read_index
from effseg.data.sources.source import Flags, Invalid, Size, Source, describe_invalid, valid_boxes
from effseg.errors import InputError

CARD = "coco2017"
Masks = Literal["auto", "voc21", "coco80", "file"]
"""``voc21``: VOC's 20 classes, everything else background; ``coco80``: COCO's 80; ``file``: the
categories of the JSON itself, in the order of their ids; ``auto``: ``coco80`` where ids and names
are COCO's, else ``file``, and no masks where no annotation has a segmentation."""
Boxes = Literal["auto", "coco80", "coco90", "file"]
"""``coco80``: the 80 classes without gaps; ``coco90``: COCO's ids less one, with their gaps, as the
published detectors have them; ``file``: the categories of the JSON; ``auto``: the classes of the
masks, where there are any, else as for masks."""


class COCO(Source):
    """Images, boxes and masks in COCO's format; images without an annotation have none, for sure.

    Crowds are kept, and marked: training counts nothing inside them, the score forgives what is
    found there. In masks they are 255, and so is a pixel that instances of two classes claim;
    pixels of categories outside the list are background, boxes of such are left out.

    Source: Lin et al., arXiv 1405.0312.

    Args:
        root: see :func:`find_coco`.
        split: folder of the images; the annotations are ``annotations/instances_SPLIT.json``.
        masks: what is drawn, see :data:`Masks`; None: no masks.
        boxes: how categories become labels, see :data:`Boxes`; None: no boxes.
        min_area: images whose instances of the masks' classes sum to fewer pixels are left out; 0
            keeps all. torchvision's recipe for VOC's classes has 1,000.
        invalid: ``drop`` leaves out boxes without an area inside their image (COCO's train2017 has
            some of zero width); ``error`` stops at the first.

    Raises:
        InputError: an unknown setting; when files are asked for: one is missing or is not COCO's
            JSON, no image is left, or a category is not in the list; on reading: as
            :meth:`Source.labels`, and a segmentation that cannot be drawn.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train2017",
        masks: Masks | None = "auto",
        boxes: Boxes | None = "auto",
        min_area: float = 0.0,
        invalid: Invalid = "drop",
    ) -> None:
        """Keep the settings."""
        known = (("masks", masks, Masks), ("boxes", boxes, Boxes), ("invalid", invalid, Invalid))
        for key, value, kind in known:
            if value is not None and value not in get_args(kind):
                raise InputError(f"{key}={value!r}: expected one of {', '.join(get_args(kind))}")
        if masks is None and boxes is None:
            raise InputError("masks and boxes are both null, expected at least one of them")
        self.root, self.split = root, split
        self.masks, self.boxes = masks, boxes
        self.min_area, self.invalid = min_area, invalid

    @cached_property
    def folder(self) -> Path:
        """The folder with ``annotations``; raises as :func:`find_coco`."""
        return find_coco(self.root)

    @property
    def json(self) -> Path:
        """The annotation file."""
        return self.folder / "annotations" / f"instances_{self.split}.json"

    @cached_property
    def index(self) -> CocoIndex:
        """The annotation file as arrays; raises as :func:`read_index`."""
        return read_index(self.json, masks=self.masks is not None)

    @cached_property
    def _mask_list(self) -> "_List | None":
        masks = self.masks
        if masks == "auto":
            if len(self.index.ids) and not self.index.segmented:
                return None
            masks = "coco80" if _is_coco(self.index.categories) else "file"
        found = None if masks is None else _List.of(masks, self._file_categories)
        if found is not None and len(found.classes) > IGNORE_INDEX:
            raise InputError(
                f"{self.json}: {len(found.number_of)} categories, expected at most "
                f"{IGNORE_INDEX - 1} in masks (masks: null reads the boxes alone)"
            )
        return found

    @cached_property
    def _box_list(self) -> "_List | None":
        boxes = self.boxes
        if boxes == "auto" and self._mask_list is not None:
            return self._mask_list
        if boxes == "auto":
            boxes = "coco80" if _is_coco(self.index.categories) else "file"
        return None if boxes is None else _List.of(boxes, self._file_categories)

    def _file_categories(self) -> dict[int, str]:
        return self.index.categories

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that the settings name, and the file serves."""
        masks: tuple[TaskName, ...] = () if self._mask_list is None else ("segmentation",)
        return masks if self._box_list is None else (*masks, "detection")

    @property
    def classes(self) -> Classes:
        """The masks' class list, or the boxes' where there are no masks."""
        found = self._mask_list or self._box_list
        if found is None:
            raise InputError(f"{self.json}: no annotation has a segmentation, and boxes are null")
        return found.classes

    @property
    def box_classes(self) -> Classes:
        """The boxes' class list."""
        return self.classes if self._box_list is None else self._box_list.classes

    @property
    def categories(self) -> dict[int, int]:
        """The file's category id of each box label."""
        boxes = self._box_list
        return {} if boxes is None else {label: c for c, label in boxes.number_of.items()}

    @property
    def card(self) -> str | None:  # type: ignore[override]
        """``coco2017`` where the classes are COCO's: own files start their ids at 1 again."""
        lists = (self._mask_list, self._box_list)
        return None if any(each and each.kind == "file" for each in lists) else CARD

    @cached_property
    def _chosen(self) -> npt.NDArray[np.int64]:
        """The numbers of the images in the index."""
        index, count = self.index, len(self.index.image_ids)
        self._check_categories()
        if self.min_area <= 0 or self._mask_list is None:
            return np.arange(count)
        drawn = np.isin(index.category_ids, list(self._mask_list.number_of))
        owner = np.repeat(np.arange(count), np.diff(index.first))
        areas = np.bincount(owner[drawn], index.areas[drawn].astype(np.float64), count)
        chosen = np.flatnonzero(areas >= self.min_area)
        if not len(chosen):
            raise InputError(f"{self.json}: no image has {self.min_area:g} pixels of the classes")
        return chosen

    def _check_categories(self) -> None:
        lists = [each for each in (self._mask_list, self._box_list) if each]
        for each in lists:
            if each.kind != "file":
                _check_names(self.json, self.index.categories)
            known = list(self.index.categories if each.kind == "file" else _card_ids())
            wrong = ~np.isin(self.index.category_ids, known)
            if wrong.any():
                number = int(np.flatnonzero(wrong)[0])
                raise InputError(
                    f"{self.json}: annotation {self.index.ids[number]}: category_id "
                    f"{self.index.category_ids[number]}, expected one of {sorted(known)}"
                )

    @cached_property
    def ids(self) -> list[str]:
        """COCO's image ids, as text, in the order of their numbers."""
        return [str(number) for number in self.index.image_ids[self._chosen].tolist()]

    def has(self, task: TaskName) -> Flags:
        """Return all or none: an image without an annotation has no objects."""
        return np.full(len(self.ids), task in self.tasks)

    def __str__(self) -> str:
        """Return the class, the split and the root."""
        return f"COCO ({self.split}) at {resources.data_root(self.root)}"

    def verify(self) -> None:
        """Look for all images, and with ``invalid="error"`` at all boxes; raises as the class."""
        index = self.index
        names = index.files[self._chosen].tolist()
        look_for([self.folder / self.split / name for name in names], "image", str(self.json))
        if self._box_list is None or self.invalid == "drop":
            return
        owner = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
        limits = torch.from_numpy(index.sizes[owner])
        boxes = torch.from_numpy(index.boxes)
        inside = (boxes[:, 0] < limits[:, 1]) & (boxes[:, 1] < limits[:, 0])
        wrong = ~(valid_boxes(boxes, (1 << 30, 1 << 30)) & inside)
        if wrong.any():
            number = int(wrong.nonzero()[0])
            height, width = index.sizes[owner[number]].tolist()
            problem = describe_invalid(boxes[number : number + 1], (height, width))[1]
            raise InputError(
                f"{self.json}: annotation {index.ids[number]} of {index.files[owner[number]]}: "
                f'{problem} (invalid="drop" leaves such boxes out)'
            )

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.folder / self.split / str(self.index.files[self._chosen[index]])

    def size(self, index: int) -> Size:
        """Return (H, W) as the JSON has it."""
        height, width = self.index.sizes[self._chosen[index]].tolist()
        return height, width

    def image(self, index: int) -> torch.Tensor:
        """Decode an image and compare its size with the JSON's; raises as :class:`Source`."""
        image = super().image(index)
        height, width = self.size(index)
        if image.shape[1:] != (height, width):
            raise InputError(
                f"{self.image_path(index)}: image of {image.shape[2]}x{image.shape[1]} pixels, "
                f"expected {width}x{height} as {self.json} says"
            )
        return image

    def read_labels(self, index: int) -> Sample:
        """Return mask and boxes; raises as the class says."""
        number = int(self._chosen[index])
        found = Sample()
        if self._mask_list is not None:
            found["mask"] = torch.from_numpy(self._draw(number, self._mask_list))
        if self._box_list is not None:
            places = self._box_places(number, self._box_list)
            categories = self.index.category_ids[places].tolist()
            labels = [self._box_list.number_of[category] for category in categories]
            found["boxes"] = torch.from_numpy(self.index.boxes[places])
            found["labels"] = torch.tensor(labels, dtype=torch.int64)
            found["crowd"] = torch.from_numpy(self.index.crowds[places])
            found["area"] = torch.from_numpy(self.index.areas[places])
        return found

    def _box_places(self, number: int, classes: "_List") -> npt.NDArray[np.int64]:
        """The annotations of an image whose category is in the list."""
        objects = self.index.objects(number)
        known = np.isin(self.index.category_ids[objects], list(classes.number_of))
        return np.arange(objects.start, objects.stop)[known]

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the JSON, and the annotation's id."""
        if number is None or self._box_list is None:
            return f"{self.json}: image {self.ids[index]}"
        place = self._box_places(int(self._chosen[index]), self._box_list)[number]
        return f"{self.json}: annotation {self.index.ids[place]} of {self.image_path(index).name}"

    def _draw(self, number: int, classes: "_List") -> npt.NDArray[np.uint8]:
        from faster_coco_eval.core import mask as coder

        index, size = self.index, self.index.sizes[number].tolist()
        result = np.zeros(size, np.uint8)
        for place in range(*index.objects(number).indices(len(index.ids))):
            label = classes.number_of.get(int(index.category_ids[place]))
            if label is None:
                continue
            value, runs = label + 1, index.run_lengths(place)
            try:
                inside = coder.decode({"size": size, "counts": runs}) if runs else None
            except Exception:  # the C code raises what it likes
                inside = None
            if inside is None or list(inside.shape) != size:
                raise InputError(
                    f"{self.json}: annotation {index.ids[place]}: segmentation cannot be drawn, "
                    "expected polygons of 3 or more corners, or run lengths of the image's size"
                )
            inside = inside.astype(bool)
            if index.crowds[place]:
                result[inside] = IGNORE_INDEX
                continue
            taken = inside & (result != 0) & (result != value)
            result[inside & (result == 0)] = value
            result[taken] = IGNORE_INDEX
        return result


@dataclass(frozen=True)
class _List:
    """A class list, and the number of each category in it, without the background."""

    kind: str
    classes: Classes
    number_of: dict[int, int]

    @classmethod
    def of(cls, kind: str, categories: Any) -> "_List":
        """Make one of :data:`Masks` or :data:`Boxes`; ``categories()`` gives the file's."""
        if kind == "file":
            names: Sequence[str] = list(categories().values())
            classes = Classes.from_names(["background", *names])
            return cls(kind, classes, {c: i for i, c in enumerate(categories())})
        if kind == "voc21":
            ids = [int(i) for i in resources.load_yaml(resources.find("datasets", CARD))["voc_ids"]]
            return cls(kind, Classes.from_card("voc2012"), {c: i for i, c in enumerate(ids)})
        ids = list(_card_ids())
        if kind == "coco80":
            return cls(kind, Classes.from_card(CARD), {c: i for i, c in enumerate(ids)})
        names = ["background", *(_card_ids().get(i, f"id {i}") for i in range(1, max(ids) + 1))]
        return cls(kind, Classes.from_names(names), {c: c - 1 for c in ids})


@lru_cache(maxsize=1)
def _card_ids() -> dict[int, str]:
    """Return COCO's category ids in order, with their names."""
    card = resources.load_yaml(resources.find("datasets", CARD))
    return {int(entry["id"]): str(entry["name"]) for entry in card["classes"][1:]}


def _is_coco(categories: dict[int, str]) -> bool:
    return categories.items() <= _card_ids().items()


def _check_names(path: Path, categories: dict[int, str]) -> None:
    for number, name in categories.items():
        expected = _card_ids().get(number)
        if name != expected:
            raise InputError(
                f"{path}: category {number} is {name!r}, expected {expected!r} as in COCO "
                '("file" takes the categories as they are)'
            )


def find_coco(root: str | Path | None = None) -> Path:
    """Find the folder that holds ``annotations/instances_SPLIT.json`` and the images' folders.

    Args:
        root: that folder, or one that holds it as ``coco2017`` or ``coco``; None looks at the
            variable ``EFFSEG_DATA``, and without it at ``./datasets``.

    Raises:
        InputError: no such folder; the message names the layout and the places looked at.
    """
    base = resources.data_root(root)
    places = (base / "coco2017", base / "coco", base)
    for place in places:
        if (place / "annotations").is_dir():
            return place
    raise InputError(
        f"{base}: no COCO here; expected annotations/instances_SPLIT.json beside the folders of "
        f"images; looked at {', '.join(str(place) for place in places)} "
        "(set the root, or the variable EFFSEG_DATA)"
    )
