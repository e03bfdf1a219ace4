"""COCO's annotation format: detection, and masks rendered from the instances."""

# H W pixels, N boxes, K classes

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import clip_boxes_to_image

from effseg import resources
from effseg.data.boxes import Invalid, find_invalid, valid_boxes
from effseg.data.coco_file import CocoPhoto, find_coco, read_annotations
from effseg.data.dataset import PhotoDataset, Transform
from effseg.data.files import read_image
from effseg.data.pairs import look_for
from effseg.data.samples import IGNORE_INDEX, Classes, Sample, TaskName
from effseg.data.voc import VOCSegmentation
from effseg.errors import InputError

CARD = "coco2017"
Labels = Literal["coco80", "coco90", "file"]
"""``coco80``: the 80 classes without gaps; ``coco90``: COCO's ids less one, with their gaps, as the
published detectors have them; ``file``: the categories of the JSON itself, in the order of ids."""
Masks = Literal["coco_voc21", "coco80"]
"""``coco_voc21``: VOC's 20 classes, everything else background; ``coco80``: all 80."""


class COCO(PhotoDataset):
    """What both data sets read: photos, and the annotations of each; ids may have gaps.

    Args:
        root: see :func:`find_coco`.
        split: folder of the photos; the annotations are ``annotations/instances_SPLIT.json``.
        transform: a function from a sample to a sample.

    Raises:
        InputError: a file is missing or is not COCO's JSON (cut in the middle, a key or photo that
            is not there).
    """

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        transform: Transform | None,
    ) -> None:
        """Read the JSON; the class list is the subclass's."""
        folder = find_coco(root)
        self.json = folder / "annotations" / f"instances_{split}.json"
        self.photos, self.categories = read_annotations(self.json)
        self.folder = folder / split
        super().__init__(Classes((), ()), transform, self.json)
        look_for([self.folder / photo.file for photo in self.photos], "photo", self.json)

    @property
    def ids(self) -> list[str]:
        """COCO's image ids, as text."""
        return [str(photo.id) for photo in self.photos]

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.photos)

    def read_photo(self, photo: CocoPhoto) -> torch.Tensor:
        """Decode a photo and compare its size with the JSON's."""
        path = self.folder / photo.file
        image = read_image(path)
        if tuple(image.shape[1:]) != photo.size:
            height, width = image.shape[1:]
            raise InputError(
                f"{path}: photo of {width}x{height} pixels, expected {photo.size[1]}x"
                f"{photo.size[0]} as {self.json} says"
            )
        return image

    def _check_categories(self, known: Mapping[int, int]) -> None:
        for photo in self.photos:
            for annotation in photo.annotations:
                if annotation["category_id"] not in known:
                    raise InputError(
                        f"{self.json}: annotation {annotation.get('id')}: category_id "
                        f"{annotation['category_id']}, expected one of {sorted(known)}"
                    )


class COCODetection(COCO):
    """Photos and boxes in COCO's format; photos without a box are kept.

    Boxes that reach over the photo's edge are cut there. Crowds are kept, and marked: training
    counts nothing inside them, the score forgives what is found there.

    Samples: ``image`` (3, H, W) uint8 RGB, ``boxes`` (N, 4) float32 as x1 y1 x2 y2 in pixels,
    ``labels`` (N,) int64 0 … K-1, ``crowd`` (N,) bool, ``area`` (N,) float32; ``id`` is COCO's
    image id as text.

    Source: Lin et al., arXiv 1405.0312.

    Args:
        root: see :func:`find_coco`.
        split: ``train2017``, ``val2017``, or another folder of the same layout.
        transform: a function from a sample to a sample.
        labels: how categories become labels, see :data:`Labels`.
        invalid: ``error`` stops at a box without an area inside its photo; ``drop`` leaves such
            boxes out (COCO's own train2017 has some of zero width).

    Raises:
        InputError: as :class:`COCO`, and a category that is not in the list, or an invalid box.
    """

    tasks: tuple[TaskName, ...] = ("detection",)

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "val2017",
        transform: Transform | None = None,
        labels: Labels = "coco80",
        invalid: Invalid = "error",
    ) -> None:
        """Read the JSON and check every box."""
        for name, value, kind in (("labels", labels, Labels), ("invalid", invalid, Invalid)):
            if value not in get_args(kind):
                raise InputError(f"{name}={value!r}: expected one of {', '.join(get_args(kind))}")
        super().__init__(root, split, transform)
        self.classes, self.label_of = detection_classes(labels, self.categories)
        self.category_of = {label: category for category, label in self.label_of.items()}
        self.dropped = 0
        self._check_categories(self.label_of)
        for photo in self.photos:
            boxes = photo.boxes()
            wrong = find_invalid(boxes, photo.size)
            if wrong is not None and invalid == "error":
                annotation = photo.annotations[wrong[0]].get("id")
                raise InputError(
                    f"{self.json}: annotation {annotation} of {photo.file}: {wrong[1]} "
                    '(invalid="drop" leaves such boxes out)'
                )
            if wrong is not None:
                keep = valid_boxes(boxes, photo.size).tolist()
                self.dropped += keep.count(False)
                photo.annotations = [
                    a for a, good in zip(photo.annotations, keep, strict=True) if good
                ]

    def read(self, index: int) -> Sample:
        """Read photo and boxes.

        Raises:
            InputError: the photo is truncated, corrupt, or of another size than the JSON says.
        """
        photo = self.photos[index]
        objects = photo.annotations
        boxes = clip_boxes_to_image(photo.boxes(), photo.size)
        sides = boxes[:, 2:] - boxes[:, :2]
        area = [float(a.get("area", sides[i].prod())) for i, a in enumerate(objects)]
        return Sample(
            id=str(photo.id),
            image=self.read_photo(photo),
            boxes=boxes,
            labels=torch.tensor([self.label_of[a["category_id"]] for a in objects]).long(),
            crowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in objects], dtype=torch.bool),
            area=torch.tensor(area, dtype=torch.float32),
        )


class COCOSegmentation(COCO):
    """Photos of COCO with masks rendered from their instances.

    A pixel that instances of two classes claim is 255, and so is a crowd's; pixels of categories
    outside the list are background.

    Samples: ``image`` (3, H, W) uint8 RGB, ``mask`` (H, W) uint8 with 0 … K-1 and 255.

    Args:
        root: see :func:`find_coco`.
        split: ``train2017`` or ``val2017``.
        transform: a function from a sample to a sample.
        masks: the class list, see :data:`Masks`.
        min_area: photos whose instances of the list sum to fewer pixels are left out; 0 keeps all.
            torchvision's recipe for VOC's classes has 1,000.

    Raises:
        InputError: as :class:`COCO`, and no photo left, or a polygon that cannot be drawn.
    """

    tasks: tuple[TaskName, ...] = ("segmentation",)

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train2017",
        transform: Transform | None = None,
        masks: Masks = "coco_voc21",
        min_area: float = 0.0,
    ) -> None:
        """Read the JSON and choose the photos."""
        if masks not in get_args(Masks):
            raise InputError(f"masks={masks!r}: expected one of {', '.join(get_args(Masks))}")
        super().__init__(root, split, transform)
        self.classes, self.value_of = mask_classes(masks)
        self._check_categories(_card_ids())
        if min_area > 0:
            self.photos = [photo for photo in self.photos if self._area(photo) >= min_area]
        if not self.photos:
            raise InputError(f"{self.json}: no photo has {min_area:g} pixels of the classes")

    def _area(self, photo: CocoPhoto) -> float:
        objects = [a for a in photo.annotations if a["category_id"] in self.value_of]
        return sum(float(a.get("area", 0.0)) for a in objects)

    def read(self, index: int) -> Sample:
        """Read the photo and draw its mask.

        Raises:
            InputError: as :meth:`COCODetection.read`, or a segmentation that cannot be drawn.
        """
        photo = self.photos[index]
        mask = torch.from_numpy(self._draw(photo))
        return Sample(id=str(photo.id), image=self.read_photo(photo), mask=mask)

    def _draw(self, photo: CocoPhoto) -> npt.NDArray[np.uint8]:
        from faster_coco_eval.core import mask as rle

        result = np.zeros(photo.size, np.uint8)
        for annotation in photo.annotations:
            value = self.value_of.get(annotation["category_id"])
            if value is None:
                continue
            try:
                found = rle.frPyObjects(annotation["segmentation"], *photo.size)
                inside = rle.decode(found)
            except Exception as error:  # the C code raises what it likes
                raise InputError(
                    f"{self.json}: annotation {annotation.get('id')}: segmentation cannot be "
                    f"drawn: {' '.join(str(error).split())}"
                ) from error
            inside = inside.any(-1) if inside.ndim == 3 else inside.astype(bool)
            if annotation.get("iscrowd", 0):
                result[inside] = IGNORE_INDEX
                continue
            taken = inside & (result != 0) & (result != value)
            result[inside & (result == 0)] = value
            result[taken] = IGNORE_INDEX
        return result


def detection_classes(
    labels: Labels, categories: Mapping[int, str]
) -> tuple[Classes, dict[int, int]]:
    """Return the class list (background first), and the label of each category id."""
    if labels == "file":
        ids = sorted(categories)
        names = ["background", *(categories[i] for i in ids)]
        return Classes.from_names(names), {c: i for i, c in enumerate(ids)}
    ids = list(_card_ids())
    classes = Classes.from_card(CARD)
    if labels == "coco80":
        return classes, {c: i for i, c in enumerate(ids)}
    named = dict(zip(ids, classes.names[1:], strict=True))
    names = ["background", *(named.get(i, f"id {i}") for i in range(1, max(ids) + 1))]
    return Classes.from_names(names), {c: c - 1 for c in ids}


def mask_classes(masks: Masks) -> tuple[Classes, dict[int, int]]:
    """Return the class list (background first), and the mask value of each category id."""
    if masks == "coco80":
        return Classes.from_card(CARD), {c: i + 1 for i, c in enumerate(_card_ids())}
    ids = resources.load_yaml(resources.find("datasets", CARD))["voc_ids"]
    return Classes.from_card(VOCSegmentation.card), {c: i + 1 for i, c in enumerate(ids)}


def _card_ids() -> dict[int, int]:
    """Return COCO's category ids in order, each with its number."""
    card = resources.load_yaml(resources.find("datasets", CARD))
    return {int(entry["id"]): i for i, entry in enumerate(card["classes"][1:])}
