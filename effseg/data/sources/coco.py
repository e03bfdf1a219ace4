"""COCO 2017 and custom data in its format: boxes, and masks drawn from the instances."""

# H W pixels, N boxes, S images

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from effseg import resources
from effseg.data.classes import Classes
from effseg.data.files import look_for
from effseg.data.sample import IGNORE_INDEX, Sample, TaskName
from effseg.data.sources.coco_classes import CARD, ClassList, card_ids, check_names, is_coco
from effseg.data.sources.coco_index import CocoIndex, read_index
from effseg.data.sources.coco_layout import find_annotations, find_images
from effseg.data.sources.coco_masks import decode
from effseg.data.sources.source import Flags, Invalid, Size, Source, describe_invalid, valid_boxes
from effseg.errors import InputError

Masks = Literal["auto", "voc21", "coco80", "file"]
"""`voc21`: VOC's 20 classes, everything else background; `coco80`: COCO's 80; `file`: the
categories of the JSON file, in the order of their ids; `auto`: `coco80` if ids and names are
COCO's, else `file`, and no masks if no annotation has a segmentation."""
Boxes = Literal["auto", "coco80", "coco90", "file"]
"""`coco80`: the 80 classes without gaps; `coco90`: COCO's ids less one, with their gaps, as the
published detectors have them; `file`: the categories of the JSON; `auto`: the classes of the
masks, where there are any, else as for masks."""
Crowds = Literal["ignored", "objects"]


class COCO(Source):
    """Images, boxes and masks in COCO's format; images without annotations have no objects.

    Crowds are kept and flagged: training ignores their area, evaluation ignores detections there.
    In masks, crowds and pixels claimed by instances of two classes are 255; pixels of categories
    outside the list are background, and their boxes are dropped.

    Source: Lin et al., arXiv 1405.0312.

    Args:
        root: see `effseg.data.sources.coco_layout.find_annotations`.
        split: name of the split, in the names of its file and its folder.
        masks: the classes of the masks, see `Masks`; None: no masks.
        boxes: the classes of the boxes, see `Boxes`; None: no boxes.
        min_area: drop images whose instances of the masks' classes sum to fewer pixels; 0 keeps
            all. torchvision's recipe for VOC's classes uses 1,000.
        invalid: `drop` drops boxes without area inside their image (COCO's train2017 has some of
            zero width); `error` raises at the first.
        crowds: `ignored`: training and evaluation ignore them; `objects`: they are objects, for
            files of CVAT, which exports masks made with a brush or by SAM as crowds.
        annotations: path of the annotation file relative to the root, with `{split}`; None:
            `annotations/instances_SPLIT.json` or `SPLIT/_annotations.coco.json`.
        images: folder of the images relative to the root, with `{split}`; None: `SPLIT`,
            `images/SPLIT`, `images`, the root, or the annotation file's folder.

    Raises:
        InputError: an unknown setting; on first access: a file is missing or is not COCO's JSON,
            no image remains, or a category is not in the list; on reading: as `Source.labels`,
            and a segmentation that cannot be drawn.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train2017",
        masks: Masks | None = "auto",
        boxes: Boxes | None = "auto",
        min_area: float = 0.0,
        invalid: Invalid = "drop",
        crowds: Crowds = "ignored",
        annotations: str | None = None,
        images: str | None = None,
    ) -> None:
        """Keep the settings."""
        known: Any = {"masks": (masks, Masks), "boxes": (boxes, Boxes)}
        known |= {"invalid": (invalid, Invalid), "crowds": (crowds, Crowds)}
        for key, (value, kind) in known.items():
            if value is not None and value not in get_args(kind):
                raise InputError(f"{key}={value!r}: expected one of {', '.join(get_args(kind))}")
        if masks is None and boxes is None:
            raise InputError("masks and boxes are both null, expected at least one of them")
        self.root, self.split = root, split
        self.masks, self.boxes = masks, boxes
        self.min_area, self.invalid = min_area, invalid
        self.crowds, self.annotations, self.images = crowds, annotations, images

    @cached_property
    def _paths(self) -> tuple[Path, Path]:
        return find_annotations(self.root, self.split, self.annotations)

    @property
    def folder(self) -> Path:
        """The data's folder; raises as `find_annotations`."""
        return self._paths[0]

    @property
    def json(self) -> Path:
        """The annotation file."""
        return self._paths[1]

    @cached_property
    def _files(self) -> list[Path]:
        names = self.index.files.tolist()
        return find_images(self.folder, self.json, self.split, names, self.images)

    @cached_property
    def index(self) -> CocoIndex:
        """The annotation file as arrays; raises as `read_index`."""
        return read_index(self.json, masks=self.masks is not None)

    @cached_property
    def _mask_list(self) -> ClassList | None:
        masks = self.masks
        if masks is not None and len(self.index.ids) and not self.index.segmented:
            if masks == "auto":
                return None
            raise InputError(
                f"{self.json}: no annotation has a segmentation, expected some for masks={masks} "
                "(masks: null reads the boxes alone)"
            )
        if masks == "auto":
            masks = "coco80" if is_coco(self.index.categories) else "file"
        class_list = None if masks is None else ClassList.of(masks, self.index)
        if class_list is not None and len(class_list.classes) > IGNORE_INDEX:
            raise InputError(
                f"{self.json}: {len(class_list.classes) - 1} categories, expected at most "
                f"{IGNORE_INDEX - 1} in masks (masks: null reads the boxes alone)"
            )
        return class_list

    @cached_property
    def _box_list(self) -> ClassList | None:
        boxes = self.boxes
        if boxes == "auto" and self._mask_list is not None:
            return self._mask_list
        if boxes == "auto":
            boxes = "coco80" if is_coco(self.index.categories) else "file"
        return None if boxes is None else ClassList.of(boxes, self.index)

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that the settings name, and the file serves."""
        masks: tuple[TaskName, ...] = () if self._mask_list is None else ("segmentation",)
        return masks if self._box_list is None else (*masks, "detection")

    @property
    def classes(self) -> Classes:
        """The masks' class list, or the boxes' where there are no masks."""
        class_list = self._mask_list or self._box_list
        if class_list is None:
            raise InputError(f"{self.json}: no annotation has a segmentation, and boxes are null")
        return class_list.classes

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
        """`coco2017` where the classes are COCO's: own files start their ids at 1 again."""
        lists = (self._mask_list, self._box_list)
        return None if any(each and each.kind == "file" for each in lists) else CARD

    @cached_property
    def _chosen(self) -> npt.NDArray[np.int64]:
        """The numbers of the images in the index."""
        index, count = self.index, len(self.index.image_ids)
        for fault in index.faults:
            self.refuse(fault)
        if self.problems is not None:
            self._check_crowds()
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
        if any(each.kind != "file" for each in lists):
            check_names(self.index)
        known = list(card_ids() if all(each.kind != "file" for each in lists) else ())
        known = known or list(self.index.categories)
        for number in np.flatnonzero(~np.isin(self.index.category_ids, known)).tolist():
            category = self.index.category_ids[number]
            expected = f"expected one of {sorted(known)}"
            self.refuse(f"{self.index.name(number)}: category_id {category}, {expected}")

    def _check_crowds(self) -> None:
        crowds = self.index.crowds
        if self.crowds == "ignored" and len(crowds) and crowds.all():
            self.refuse(
                f"{self.json}: all {len(crowds)} annotations are crowds, which teach nothing; "
                "expected iscrowd 0 of objects (crowds: objects takes them as such)"
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
        """Look for all images, and at all that the file says of them; raises as the class."""
        index = self.index
        files = [self._files[number] for number in self._chosen.tolist()]
        look_for(files, "image", str(self.json))
        self._check_crowds()
        for lines in index.image_faults.values():
            self.refuse(lines[0])
        drawn = self._mask_list.number_of if self._mask_list else {}
        undrawn = self._undrawn & np.isin(index.category_ids, list(drawn))
        for number in np.flatnonzero(undrawn).tolist():
            self.refuse(f"{index.name(number)}: {index.why_not_drawn(number)}")
        if self._box_list is None or self.invalid == "drop":
            return
        owner = np.repeat(np.arange(len(index.image_ids)), np.diff(index.first))
        limits = torch.from_numpy(index.sizes[owner])
        boxes = torch.from_numpy(index.boxes)
        inside = (boxes[:, 0] < limits[:, 1]) & (boxes[:, 1] < limits[:, 0])
        invalid = ~(valid_boxes(boxes, (1 << 30, 1 << 30)) & inside)
        for number in invalid.nonzero().flatten().tolist():
            height, width = index.sizes[owner[number]].tolist()
            self.refuse(
                f"{index.name(number)} of {index.files[owner[number]]}: "
                f"{describe_invalid(boxes[number], (height, width))} "
                '(invalid="drop" leaves such boxes out)'
            )

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        return self._files[int(self._chosen[index])]

    def size(self, index: int) -> Size:
        """Return (H, W) as the JSON has it."""
        height, width = self.index.sizes[self._chosen[index]].tolist()
        return height, width

    def image(self, index: int) -> torch.Tensor:
        """Decode an image and compare its size with the JSON's; raises as `Source`."""
        image = super().image(index)
        height, width = self.size(index)
        size = (image.shape[1], image.shape[2])
        if size != (height, width):
            raise InputError(
                f"{self.image_path(index)}: image of {size[1]}x{size[0]} pixels, "
                f"expected {width}x{height} as {self.json} says"
                f"{self.exif(index, (height, width), size, 'the size there')}"
            )
        return image

    def read_labels(self, index: int) -> Sample:
        """Return mask and boxes; raises as the class says."""
        number = int(self._chosen[index])
        for fault in self.index.image_faults.get(number, ()):
            self.refuse(fault)
        sample = Sample()
        if self._mask_list is not None:
            sample["mask"] = torch.from_numpy(self._draw(number, self._mask_list))
        if self._box_list is not None:
            annotations = self._box_annotations(number, self._box_list)
            categories = self.index.category_ids[annotations].tolist()
            labels = [self._box_list.number_of[category] for category in categories]
            sample["boxes"] = torch.from_numpy(self.index.boxes[annotations])
            sample["labels"] = torch.tensor(labels, dtype=torch.int64)
            crowds = self.index.crowds[annotations] & (self.crowds == "ignored")
            sample["crowd"] = torch.from_numpy(crowds)
            sample["area"] = torch.from_numpy(self.index.areas[annotations])
        return sample

    def _box_annotations(self, number: int, classes: ClassList) -> npt.NDArray[np.int64]:
        """The annotations of an image whose category is in the list."""
        objects = self.index.objects(number)
        known = np.isin(self.index.category_ids[objects], list(classes.number_of))
        return np.arange(objects.start, objects.stop)[known]

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the JSON, and the annotation's id."""
        if number is None or self._box_list is None:
            return f"{self.json}: image {self.ids[index]}"
        annotation = self._box_annotations(int(self._chosen[index]), self._box_list)[number]
        return f"{self.index.name(int(annotation))} of {self.image_path(index).name}"

    def _draw(self, number: int, classes: ClassList) -> npt.NDArray[np.uint8]:
        index = self.index
        height, width = index.sizes[number].tolist()
        result = np.zeros((height, width), np.uint8)
        for annotation in range(*index.objects(number).indices(len(index.ids))):
            label = classes.number_of.get(int(index.category_ids[annotation]))
            if label is None:
                continue
            try:
                inside = self._pixels(annotation, (height, width))
            except InputError as error:
                self.refuse(f"{index.name(annotation)}: {error}")
                continue
            value = label + 1
            if index.crowds[annotation] and self.crowds == "ignored":
                result[inside] = IGNORE_INDEX
                continue
            taken = inside & (result != 0) & (result != value)
            result[inside & (result == 0)] = value
            result[taken] = IGNORE_INDEX
        return result

    def _pixels(self, annotation: int, size: Size) -> npt.NDArray[np.bool_]:
        runs = self.index.run_lengths(annotation)
        if runs:
            return decode(runs, size)
        if self._undrawn[annotation]:
            raise InputError(self.index.why_not_drawn(annotation))
        # A crowd is a region to leave out, and its box is one; an object without an area is none.
        x1, y1, x2, y2 = (max(round(side), 0) for side in self.index.boxes[annotation].tolist())
        inside = np.zeros(size, bool)
        inside[y1:y2, x1:x2] = True
        return inside

    @cached_property
    def _undrawn(self) -> npt.NDArray[np.bool_]:
        """Which annotations should be drawn, and cannot be."""
        index = self.index
        missing: npt.NDArray[np.bool_] = index.rle_spans[:, 0] == index.rle_spans[:, 1]
        if self.crowds == "ignored":
            missing &= ~index.crowds
        missing &= (index.boxes[:, 2:] > index.boxes[:, :2]).all(1)
        missing[list(index.undrawable)] = True
        return missing
