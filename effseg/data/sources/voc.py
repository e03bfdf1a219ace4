"""Pascal VOC 2012: masks, with the additional ones of SBD (`train_aug`), and boxes."""

# H W pixels, N boxes

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from effseg import resources
from effseg.data.classes import Classes, load_classes
from effseg.data.files import IMAGE_SUFFIXES, look_for, read_lines, read_mask, walk
from effseg.data.sample import Sample, TaskName
from effseg.data.sources.source import Flags, Source
from effseg.data.sources.voc_xml import read_annotation
from effseg.errors import InputError

MaskSplit = Literal["train", "val", "trainval", "train_aug"]
BoxSplit = Literal["train", "val", "trainval", "train_aug", "seg_train", "seg_val"]
_AUG_LISTS = ("train_aug.txt", "trainaug.txt")


@dataclass(frozen=True)
class VOCFiles:
    """Paths of an image and its labels; None: no labels of that kind."""

    image: Path
    mask: Path | None = None
    annotation: Path | None = None


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
        """Keep the settings."""
        for key, value, kind in (("masks", masks, MaskSplit), ("boxes", boxes, BoxSplit)):
            if value is not None and value not in get_args(kind):
                raise InputError(f"{key}={value!r}: expected one of {', '.join(get_args(kind))}")
        if masks is None and boxes is None:
            raise InputError("masks and boxes are both null, expected at least one of them")
        self.root = root
        self.masks = masks
        self.boxes = boxes
        self.download = download
        self.class_list = classes
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
        return find_voc(self.root)

    @cached_property
    def _index(self) -> dict[str, VOCFiles]:
        voc = self.folder
        files = {} if self.masks is None else _mask_files(voc, self.masks)
        listed = {} if self.boxes is None else _box_files(voc, self.boxes)
        for name, image in listed.items():
            known = files.get(name, VOCFiles(image))
            files[name] = replace(known, annotation=voc / "Annotations" / f"{name}.xml")
        return files

    @cached_property
    def ids(self) -> list[str]:
        """The images' ids, as `2007_000032`."""
        return list(self._index)

    @cached_property
    def _files(self) -> list[VOCFiles]:
        return list(self._index.values())

    def has(self, task: TaskName) -> Flags:
        """Return which images have a mask, or boxes."""
        kind = "mask" if task == "segmentation" else "annotation"
        return np.array([getattr(files, kind) is not None for files in self._files], bool)

    def __str__(self) -> str:
        """Return the class, the lists and the root."""
        name = type(self).__name__
        return (
            f"{name} (masks {self.masks}, boxes {self.boxes}) at {resources.data_root(self.root)}"
        )

    def prepare(self) -> None:
        """Fetch VOC, if the source was told to and it is not there."""
        if self.download:
            from effseg.data.download import download_voc2012  # it draws bars

            lists = (self.masks, self.boxes)
            download_voc2012(resources.data_root(self.root), sbd="train_aug" in lists)

    def verify(self) -> None:
        """Look for the files of all images; raises as `Source`."""
        files = self._files
        look_for([each.image for each in files], "image", str(self))
        look_for([each.mask for each in files if each.mask], "mask", str(self))
        annotations = [each.annotation for each in files if each.annotation]
        look_for(annotations, "annotation", str(self))

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        return self._files[index].image

    def read_labels(self, index: int) -> Sample:
        """Read mask and annotation, whichever the image has; raises as the class says."""
        files, sample = self._files[index], Sample()
        if files.mask is not None:
            sample["mask"] = read_mask(files.mask, self.classes)
        if files.annotation is not None:
            sample.update(read_annotation(files.annotation, self.classes, self.refuse))
        return sample

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the file of the labels, and the number of the object from 1."""
        files = self._files[index]
        path = files.mask if task == "segmentation" else files.annotation
        return f"{path}" if number is None else f"{path}: object {number + 1}"


def find_voc(root: str | Path | None = None) -> Path:
    """Find the folder `VOC2012` (the one that holds `JPEGImages` and `ImageSets`).

    Args:
        root: a folder that holds `VOCdevkit/VOC2012`, or `VOCdevkit`, or `VOC2012` itself.
            None looks at the variable `EFFSEG_DATA`, and without it at `./datasets`.

    Raises:
        InputError: no such folder; the message names the layout and the places looked at.
    """
    base = resources.data_root(root)
    folders = (base / "VOCdevkit" / "VOC2012", base / "VOC2012", base)
    for folder in folders:
        if (folder / "ImageSets" / "Segmentation").is_dir() and (folder / "JPEGImages").is_dir():
            return folder
    raise InputError(
        f"{base}: no VOC 2012 here; expected VOCdevkit/VOC2012/{{JPEGImages,SegmentationClass,"
        f"ImageSets/Segmentation}}; looked at {', '.join(map(str, folders))} "
        "(set the root, or the variable EFFSEG_DATA)"
    )


def _mask_files(voc: Path, split: MaskSplit) -> dict[str, VOCFiles]:
    lists = voc / "ImageSets" / "Segmentation"
    if split != "train_aug":
        return _official(voc, read_lines(lists / f"{split}.txt"))
    files, source = _train_aug(voc)
    val = lists / "val.txt"
    shared = [name for name in read_lines(val) if name in files] if val.is_file() else []
    if shared:
        raise InputError(
            f"{source}: {shared[0]} is in val too ({len(shared)} shared images); "
            "expected a training list without the images of val"
        )
    return files


def _box_files(voc: Path, split: BoxSplit) -> dict[str, Path]:
    """Return the images of a list of boxes, by id."""
    if split == "train_aug":
        return {name: files.image for name, files in _mask_files(voc, split).items()}
    kind, name = ("Segmentation", split[4:]) if split.startswith("seg_") else ("Main", split)
    ids, images = read_lines(voc / "ImageSets" / kind / f"{name}.txt"), _images(voc)
    return {name: voc / "JPEGImages" / images.get(name, f"{name}.jpg") for name in ids}


def _images(voc: Path) -> dict[str, str]:
    """Return the names of the image files by id; of several files the one in VOC's own format."""
    files = [path.name for path in walk(voc / "JPEGImages", nested=False)]
    files = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    files.sort(key=lambda file: not file.endswith(".jpg"), reverse=True)  # the last one stays
    return {Path(file).stem: file for file in files}


def _official(voc: Path, ids: list[str]) -> dict[str, VOCFiles]:
    there, images, masks = _images(voc), voc / "JPEGImages", voc / "SegmentationClass"
    return {
        name: VOCFiles(images / there.get(name, f"{name}.jpg"), masks / f"{name}.png")
        for name in ids
    }


def _train_aug(voc: Path) -> tuple[dict[str, VOCFiles], Path]:
    """Return the files, and the list or folder that they come from."""
    if (voc / "SegmentationClassAug").is_dir():
        return _from_folder(voc)
    above = [voc.parent, voc.parent.parent] if voc.parent.name == "VOCdevkit" else [voc.parent]
    for base in (voc, *above):
        sbd = base / "benchmark_RELEASE" / "dataset"
        if (sbd / "cls").is_dir():
            return _from_sbd(voc, sbd), sbd
    raise InputError(
        f"{voc}: no masks for train_aug; expected {voc / 'SegmentationClassAug'}, or SBD's "
        f"benchmark_RELEASE/dataset in {', '.join(map(str, (voc, *above)))}"
    )


def _from_folder(voc: Path) -> tuple[dict[str, VOCFiles], Path]:
    lists, folder = voc / "ImageSets" / "Segmentation", voc / "SegmentationClassAug"
    present = {path.name for path in walk(folder, nested=False)}
    listed = [lists / name for name in _AUG_LISTS if (lists / name).is_file()]
    if listed:
        ids = read_lines(listed[0])
    else:
        # A ready folder usually holds the masks of val as well.
        val = set(read_lines(lists / "val.txt"))
        ids = sorted({Path(name).stem for name in present if name.endswith(".png")} - val)
    train = lists / "train.txt"
    official = set(read_lines(train)) if train.is_file() else set[str]()
    files, images = {}, _images(voc)
    for name in ids:
        use_official = f"{name}.png" not in present and name in official
        masks = voc / "SegmentationClass" if use_official else folder
        image = voc / "JPEGImages" / images.get(name, f"{name}.jpg")
        files[name] = VOCFiles(image, masks / f"{name}.png")
    return files, listed[0] if listed else folder


def _from_sbd(voc: Path, sbd: Path) -> dict[str, VOCFiles]:
    lists = voc / "ImageSets" / "Segmentation"
    official = read_lines(lists / "train.txt")
    added = {*read_lines(sbd / "train.txt"), *read_lines(sbd / "val.txt")}
    added -= {*official, *read_lines(lists / "val.txt")}
    images = _images(voc)
    files = _official(voc, official)
    for name in added:
        image = sbd / "img" / f"{name}.jpg"
        image = voc / "JPEGImages" / images[name] if name in images else image
        files[name] = VOCFiles(image, sbd / "cls" / f"{name}.mat")
    return dict(sorted(files.items()))
