"""COCO 2017 and custom data in its format: boxes, and masks drawn from the instances."""

# H W pixels, N boxes, S images, A annotations of the file

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from effseg import resources
from effseg.data.classes import Classes, coco_categories
from effseg.data.listing import look_for
from effseg.data.sample import IGNORE_INDEX, Sample, TaskName
from effseg.data.sources.coco_classes import CARD, ClassList, class_list
from effseg.data.sources.coco_index import CocoIndex, read_index
from effseg.data.sources.coco_layout import find_annotations, find_images
from effseg.data.sources.coco_masks import decode
from effseg.data.sources.source import Invalid, Size, Source, check_choices, valid_boxes
from effseg.errors import InputError

Masks = Literal["auto", "voc21", "coco80", "file"]
"""`voc21`: VOC's 20 classes, everything else background; `coco80`: COCO's 80; `file`: the
categories of the JSON file, in the order of their ids; `auto`: `coco80` if ids and names are
COCO's, else `file`, and no masks if no annotation has a segmentation."""
Boxes = Literal["auto", "coco80", "coco90", "file"]
"""`coco80`: the 80 classes without gaps; `coco90`: COCO's ids less one, with their gaps, as the
published detectors have them; `file`: the categories of the JSON; `auto`: the classes of the
masks, if there are any, else as for masks."""
Crowds = Literal["ignored", "objects"]
Overlaps = Literal["ignored", "later"]


class COCO(Source):
    """Images, boxes and masks in COCO's format; images without annotations have no objects.

    Crowds are kept and flagged: training ignores their area, evaluation ignores detections there.
    In masks, crowds and, unless `overlaps` says otherwise, pixels claimed by instances of two
    classes are 255; pixels of categories outside the list are background, and their boxes are
    dropped.

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
        overlaps: pixels of instances of two classes in masks: `ignored`, as COCO's own; `later`:
            the later annotation's class, for files in which objects lie on others (a car on a
            road). A crowd ignores its pixels in any case.

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
        overlaps: Overlaps = "ignored",
    ) -> None:
        check_choices(masks=(masks, Masks), boxes=(boxes, Boxes))
        check_choices(invalid=(invalid, Invalid), crowds=(crowds, Crowds))
        check_choices(overlaps=(overlaps, Overlaps))
        self.root, self.split = root, split
        self.masks, self.boxes = masks, boxes
        self.min_area, self.invalid = min_area, invalid
        self.crowds, self.overlaps = crowds, overlaps
        self.annotations, self.images = annotations, images

    @cached_property
    def _paths(self) -> tuple[Path, Path]:
        return find_annotations(self.root, self.split, self.annotations)

    @property
    def folder(self) -> Path:
        """The data's folder; raises as `find_annotations`."""
        return self._paths[0]

    @property
    def json(self) -> Path:
        """The annotation file; raises as `find_annotations`."""
        return self._paths[1]

    @cached_property
    def index(self) -> CocoIndex:
        """The annotation file as arrays; raises as `read_index`."""
        return read_index(self.json, masks=self.masks is not None)

    @cached_property
    def _files(self) -> list[Path]:
        return find_images(*self._paths, self.split, self.index.files.tolist(), self.images)

    @cached_property
    def _mask_list(self) -> ClassList | None:
        if self.masks is None:
            return None
        if len(self.index.annotations) and not self.index.segmented:
            if self.masks == "auto":
                return None
            raise InputError(
                f"{self.json}: no annotation has a segmentation, expected some for "
                f"masks={self.masks} (masks: null reads the boxes alone)"
            )
        masks = class_list(self.masks, self.index)
        if len(masks.classes) > IGNORE_INDEX:
            raise InputError(
                f"{self.json}: {len(masks.classes) - 1} categories, expected at most "
                f"{IGNORE_INDEX - 1} in masks (masks: null reads the boxes alone)"
            )
        return masks

    @cached_property
    def _box_list(self) -> ClassList | None:
        if self.boxes == "auto" and self._mask_list is not None:
            return self._mask_list
        return None if self.boxes is None else class_list(self.boxes, self.index)

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks of the settings that the file has labels for."""
        masks: tuple[TaskName, ...] = () if self._mask_list is None else ("segmentation",)
        return masks if self._box_list is None else (*masks, "detection")

    @property
    def classes(self) -> Classes:
        """The class list of the masks, or of the boxes if there are no masks."""
        listed = self._mask_list or self._box_list
        if listed is None:
            raise InputError(f"{self.json}: no annotation has a segmentation, and boxes are null")
        return listed.classes

    @property
    def box_classes(self) -> Classes:
        """The class list of the boxes."""
        return self.classes if self._box_list is None else self._box_list.classes

    @property
    def categories(self) -> dict[int, int]:
        """The file's category id of each box label."""
        boxes = self._box_list
        return {} if boxes is None else {label: c for c, label in boxes.label_of.items()}

    @cached_property
    def card(self) -> str | None:  # type: ignore[override]
        """`coco2017` if classes and images are COCO's, which names its files by their ids.

        Custom files number their images from 1 again.
        """
        names = zip(self.index.image_ids.tolist(), self.index.files.tolist(), strict=True)
        theirs = all(Path(file).stem.endswith(i.zfill(12)) for i, file in names)
        return CARD if theirs and not self._has_custom_classes else None

    @property
    def _has_custom_classes(self) -> bool:
        return any(listed and listed.kind == "file" for listed in (self._mask_list, self._box_list))

    @cached_property
    def _chosen(self) -> npt.NDArray[np.int64]:
        """The numbers of the images in the index, (S,)."""
        index, table = self.index, self.index.annotations
        for fault in index.faults:
            self.refuse(fault)
        if len(self._ignored) and self._ignored.all():
            self.refuse(
                f"{self.json}: all {len(table)} annotations are crowds, which teach nothing; "
                "expected iscrowd 0 of objects (crowds: objects takes them as such)"
            )
        known = sorted(index.categories if self._has_custom_classes else coco_categories()[0])
        for row in np.flatnonzero(~np.isin(table["category"], known)).tolist():
            category = table["category"][row]
            self.refuse(f"{index.name(row)}: category_id {category}, expected one of {known}")
        if self.min_area <= 0 or self._mask_list is None:
            return np.arange(len(index.files))
        drawn = table[self._mask_list.labels >= 0]
        areas = np.bincount(drawn["image"], drawn["area"].astype(np.float64), len(index.files))
        chosen = np.flatnonzero(areas >= self.min_area)
        if not len(chosen):
            raise InputError(f"{self.json}: no image has {self.min_area:g} pixels of the classes")
        return chosen

    @cached_property
    def _ignored(self) -> npt.NDArray[np.bool_]:
        """Which annotations are crowds to ignore, (A,)."""
        crowds: npt.NDArray[np.bool_] = self.index.annotations["crowd"] != 0
        return crowds & (self.crowds == "ignored")

    @cached_property
    def ids(self) -> list[str]:
        """COCO's image ids as text, in the order of their numbers."""
        return list(self.index.image_ids[self._chosen].tolist())

    def __str__(self) -> str:
        """Return the class, the split and the root."""
        return f"COCO ({self.split}) at {resources.data_root(self.root)}"

    def verify(self) -> None:
        """Check that all images exist, and every annotation; raises as the class."""
        index, table = self.index, self.index.annotations
        look_for([self._files[n] for n in self._chosen.tolist()], "image", str(self.json))
        suspect = self._undrawn
        if self.invalid == "error":
            height, width = torch.from_numpy(index.sizes[table["image"]]).unbind(1)
            valid = valid_boxes(torch.from_numpy(table["box"]), (height, width))
            suspect = suspect | ~valid.numpy()
        images = {*index.image_faults, *index.image_ids[table["image"][suspect]].tolist()}
        for number, image_id in enumerate(self.ids):
            if image_id in images:
                self.labels(number)  # raises

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        return self._files[int(self._chosen[index])]

    def size(self, index: int) -> Size:
        """Return (H, W) as stated in the JSON."""
        height, width = self.index.sizes[self._chosen[index]].tolist()
        return height, width

    def read_labels(self, index: int) -> Sample:
        """Return mask and boxes; raises as the class."""
        for fault in self.index.image_faults.get(self.ids[index], ()):
            self.refuse(fault)
        sample = Sample(stated_size=self.size(index))
        if self._mask_list is not None:
            sample["mask"] = torch.from_numpy(self._draw(index, self._mask_list))
        if self._box_list is not None:
            rows = self._rows(index, self._box_list)
            table = self.index.annotations[rows]
            sample["boxes"] = torch.from_numpy(table["box"].copy())
            sample["labels"] = torch.from_numpy(self._box_list.labels[rows])
            sample["crowd"] = torch.from_numpy(self._ignored[rows])
            sample["area"] = torch.from_numpy(table["area"].copy())
        return sample

    def _rows(self, index: int, listed: ClassList) -> npt.NDArray[np.int64]:
        """Return the rows of an image's annotations whose category is in the list."""
        rows = self.index.rows(int(self._chosen[index]))
        return np.arange(rows.start, rows.stop)[listed.labels[rows] >= 0]

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the JSON, and the annotation's id."""
        if number is None or self._box_list is None:
            return f"{self.json}: image {self.ids[index]}"
        row = int(self._rows(index, self._box_list)[number])
        return f"{self.index.name(row)} of {self.image_path(index).name}"

    def _draw(self, index: int, listed: ClassList) -> npt.NDArray[np.uint8]:
        size = self.size(index)
        mask = np.zeros(size, np.uint8)
        for row in self._rows(index, listed).tolist():
            try:
                inside = self._pixels(row, size)
            except InputError as error:
                self.refuse(f"{self.index.name(row)}: {error}")
                continue
            value = IGNORE_INDEX if self._ignored[row] else listed.labels[row] + 1
            before = mask[inside]
            over = (before == 0) | (before == value)
            if self.overlaps == "later":
                over |= before != IGNORE_INDEX
            mask[inside] = np.where(over, value, IGNORE_INDEX)
        return mask

    def _pixels(self, row: int, size: Size) -> npt.NDArray[np.bool_]:
        runs = self.index.run_lengths(row)
        if runs:
            return decode(runs, size)
        if self._undrawn[row]:
            raise InputError(
                "segmentation cannot be drawn: there is none, expected polygons or run lengths "
                "(masks: null needs none)"
            )
        # A crowd without a segmentation ignores its box; an object without an area has no pixels.
        box = np.nan_to_num(self.index.annotations["box"][row]).clip(0, max(size))
        x1, y1, x2, y2 = box.round().astype(int)
        inside = np.zeros(size, bool)
        inside[y1:y2, x1:x2] = True
        return inside

    @cached_property
    def _undrawn(self) -> npt.NDArray[np.bool_]:
        """Which objects of the masks' classes have an area but no segmentation, (A,)."""
        table = self.index.annotations
        if self._mask_list is None:
            return np.zeros(len(table), bool)
        missing: npt.NDArray[np.bool_] = table["rle"][:, 0] == table["rle"][:, 1]
        has_area = (table["box"][:, 2:] > table["box"][:, :2]).all(1)
        return missing & has_area & ~self._ignored & (self._mask_list.labels >= 0)
