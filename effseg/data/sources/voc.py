"""Pascal VOC 2012: masks, with the additional ones of SBD (`train_aug`), and boxes."""

# H W pixels, N boxes

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from effseg import resources
from effseg.data.classes import Classes, load_classes
from effseg.data.files import IMAGE_SUFFIXES, read_lines, read_mask
from effseg.data.listing import look_for, walk
from effseg.data.sample import Sample, TaskName
from effseg.data.sources.source import Flags, Source, check_choices
from effseg.data.sources.voc_xml import read_annotation
from effseg.errors import InputError

MaskSplit = Literal["train", "val", "trainval", "train_aug"]
BoxSplit = Literal["train", "val", "trainval", "train_aug", "seg_train", "seg_val"]
_AUG_LISTS = ("train_aug.txt", "trainaug.txt")


class VOC(Source):
    """Pascal VOC 2012, and data in its layout.

    The source contains the images of both lists; if there is no `.jpg` of an id, another format is
    read. Difficult objects are kept and flagged: training treats them as objects, evaluation
    ignores them.

    `train_aug` is (VOC train + SBD train + SBD val) without VOC val, 10,582 images in full. It is
    read from a ready `SegmentationClassAug` folder (with `train_aug.txt` or `trainaug.txt`
    if there is one), otherwise from SBD's original files, `benchmark_RELEASE/dataset`, below the
    root or beside `VOCdevkit`. A VOC train image without a mask in `SegmentationClassAug` uses the
    official one. In full VOC 2012, images of `train_aug` are in the boxes' `val`: after training
    on those masks, evaluate boxes on `seg_val`.

    Sources: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).

    Args:
        root: see `find_voc`.
        masks: `train`, `val`, `trainval` (`ImageSets/Segmentation`), `train_aug`, or
            None.
        boxes: `train`, `val`, `trainval` (`ImageSets/Main`); `train_aug`, `seg_train`
            or `seg_val`: the annotations of those masks' images; or None.
        download: `prepare` downloads VOC, and SBD for `train_aug`, if they are missing.
        classes: class list of custom data in VOC's layout, see
            `effseg.data.classes.load_classes`; None: VOC's.

    Raises:
        InputError: unknown split or no labels; on first access: no VOC at the root, an empty list,
            or a `train_aug` list with images of val; on reading: a file is missing or broken, or
            has an unknown class.
    """

    card: str | None = "voc2012"

    def __init__(
        self,
        root: str | Path | None = None,
        masks: MaskSplit | None = "train_aug",
        boxes: BoxSplit | None = "train_aug",
        download: bool = False,
        classes: Sequence[str] | str | None = None,
    ) -> None:
        check_choices(masks=(masks, MaskSplit), boxes=(boxes, BoxSplit))
        self.root, self.masks, self.boxes = root, masks, boxes
        self.download, self.class_list = download, classes
        if classes is not None:
            self.card = None

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks of the lists that are not None."""
        masks: tuple[TaskName, ...] = () if self.masks is None else ("segmentation",)
        return masks if self.boxes is None else (*masks, "detection")

    @cached_property
    def classes(self) -> Classes:
        """VOC's 21 classes, or those given; raises as `load_classes`."""
        if self.class_list is not None:
            return load_classes(self.class_list)
        return Classes.from_card(str(self.card))

    @cached_property
    def folder(self) -> Path:
        """The folder with `JPEGImages`; raises as `find_voc`."""
        return find_voc(self._root())

    def _root(self) -> Path:
        return resources.data_root(self.root)

    @cached_property
    def _train_aug(self) -> dict[str, Path]:
        return _find_train_aug(self.folder) if "train_aug" in (self.masks, self.boxes) else {}

    @cached_property
    def _masks(self) -> dict[str, Path]:
        """The masks by id."""
        if self.masks == "train_aug":
            return self._train_aug
        ids = _read_ids(self.folder, "Segmentation", self.masks) if self.masks else []
        return {name: self.folder / "SegmentationClass" / f"{name}.png" for name in ids}

    @cached_property
    def _annotations(self) -> dict[str, Path]:
        """The annotations by id."""
        split = (self.boxes or "").removeprefix("seg_")
        if split == "train_aug":
            ids = list(self._train_aug)
        else:
            kind = "Main" if split == self.boxes else "Segmentation"
            ids = _read_ids(self.folder, kind, split) if split else []
        return {name: self.folder / "Annotations" / f"{name}.xml" for name in ids}

    @cached_property
    def _images(self) -> dict[str, Path]:
        """The images by id, others of the folder among them."""
        files = list(walk(self.folder / "JPEGImages", nested=False))
        files.sort(key=lambda path: path.suffix == ".jpg")  # of several files the last one stays
        images = {path.stem: path for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
        for name, mask in self._train_aug.items():
            if mask.suffix == ".mat":  # SBD has images that VOC may lack
                images.setdefault(name, mask.parents[1] / "img" / f"{name}.jpg")
        return images

    @cached_property
    def ids(self) -> list[str]:
        """The images' ids, as `2007_000032`."""
        return list(self._masks | self._annotations)

    def has(self, task: TaskName) -> Flags:
        """Return which images have a mask, or boxes."""
        labelled = self._masks if task == "segmentation" else self._annotations
        return np.array([name in labelled for name in self.ids], bool)

    def __str__(self) -> str:
        """Return the class, the lists and the root."""
        name = type(self).__name__
        return f"{name} (masks {self.masks}, boxes {self.boxes}) at {self._root()}"

    def prepare(self) -> None:
        """Download what is missing, if `download` is set: VOC, and what `train_aug` needs."""
        if not self.download:
            return
        from effseg.data.download import fetch, read_archives

        voc, sbd = read_archives("voc2012")
        try:
            folder = find_voc(self._root())
        except InputError:
            folder = fetch(voc, self._root())
        ready = (folder / "SegmentationClassAug").is_dir() or _find_sbd(folder) is not None
        if "train_aug" in (self.masks, self.boxes) and not ready:
            fetch(sbd, _sbd_bases(folder)[-1])

    def verify(self) -> None:
        """Check that all files exist; raises as `Source`."""
        look_for([self.image_path(index) for index in range(len(self))], "image", str(self))
        look_for(list(self._masks.values()), "mask", str(self))
        look_for(list(self._annotations.values()), "annotation", str(self))

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        name = self.ids[index]
        return self._images.get(name, self.folder / "JPEGImages" / f"{name}.jpg")

    def read_labels(self, index: int) -> Sample:
        """Read mask and annotation, whichever the image has; raises as the class says."""
        name, sample = self.ids[index], Sample()
        if name in self._masks:
            sample["mask"] = read_mask(self._masks[name], self.classes)
        if name in self._annotations:
            sample.update(read_annotation(self._annotations[name], self.classes, self.refuse))
        return sample

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the file of the labels, and the number of the object from 1."""
        files = self._masks if task == "segmentation" else self._annotations
        path = files[self.ids[index]]
        return f"{path}" if number is None else f"{path}: object {number + 1}"


def find_voc(root: str | Path | None = None) -> Path:
    """Return the folder `VOC2012`, which contains `JPEGImages` and `ImageSets`.

    `root` contains `VOCdevkit/VOC2012`, or is `VOCdevkit`, or `VOC2012` itself; None: the variable
    `EFFSEG_DATA`, or `./datasets` if it is not set. InputError: no such folder.
    """
    base = resources.data_root(root)
    folders = (base / "VOCdevkit" / "VOC2012", base / "VOC2012", base)
    for folder in folders:
        lists = [folder / "ImageSets" / kind for kind in ("Segmentation", "Main")]
        if any(each.is_dir() for each in lists) and (folder / "JPEGImages").is_dir():
            return folder
    raise InputError(
        f"{base}: no VOC 2012 here; expected VOCdevkit/VOC2012/{{JPEGImages,SegmentationClass,"
        f"ImageSets/Segmentation}} or ImageSets/Main; looked at {', '.join(map(str, folders))} "
        "(set the root, or the variable EFFSEG_DATA)"
    )


def _read_ids(voc: Path, kind: str, split: str) -> list[str]:
    return read_lines(voc / "ImageSets" / kind / f"{split}.txt")


def _find_train_aug(voc: Path) -> dict[str, Path]:
    """Return the masks of `train_aug` by id."""
    folder, lists = voc / "SegmentationClassAug", voc / "ImageSets" / "Segmentation"
    if not folder.is_dir():
        return _from_sbd(voc)
    present = {path.stem for path in walk(folder, nested=False) if path.suffix == ".png"}
    val, train = lists / "val.txt", lists / "train.txt"
    listed = [lists / name for name in _AUG_LISTS if (lists / name).is_file()]
    if listed:
        ids = read_lines(listed[0])
        shared = sorted({*ids} & {*read_lines(val)}) if val.is_file() else []
        if shared:
            raise InputError(
                f"{listed[0]}: {shared[0]} is in val too ({len(shared)} shared images); "
                "expected a training list without the images of val"
            )
    else:  # a ready folder usually holds the masks of val as well
        ids = sorted(present - {*read_lines(val)})
    official = {*read_lines(train)} - present if train.is_file() else set()
    masks = {name: folder / f"{name}.png" for name in ids}
    return masks | {n: voc / "SegmentationClass" / f"{n}.png" for n in ids if n in official}


def _sbd_bases(voc: Path) -> list[Path]:
    return [voc, voc.parent, *([voc.parent.parent] if voc.parent.name == "VOCdevkit" else [])]


def _find_sbd(voc: Path) -> Path | None:
    candidates = [base / "benchmark_RELEASE" / "dataset" for base in _sbd_bases(voc)]
    return next((path for path in candidates if (path / "cls").is_dir()), None)


def _from_sbd(voc: Path) -> dict[str, Path]:
    sbd = _find_sbd(voc)
    if sbd is None:
        raise InputError(
            f"{voc}: no masks for train_aug; expected {voc / 'SegmentationClassAug'}, or SBD's "
            f"benchmark_RELEASE/dataset in {', '.join(map(str, _sbd_bases(voc)))}"
        )
    ids = {*read_lines(sbd / "train.txt"), *read_lines(sbd / "val.txt")}
    ids -= {*_read_ids(voc, "Segmentation", "val")}
    masks = {name: sbd / "cls" / f"{name}.mat" for name in ids}
    for name in _read_ids(voc, "Segmentation", "train"):
        masks[name] = voc / "SegmentationClass" / f"{name}.png"
    return dict(sorted(masks.items()))
