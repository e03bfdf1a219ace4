"""Pascal VOC 2012 segmentation, with the additional masks of SBD (``train_aug``)."""

# H W pixels, N boxes

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree

import torch

from effseg import resources
from effseg.data.dataset import Transform
from effseg.data.files import read_lines
from effseg.data.pairs import Pair, PairDataset, look_for
from effseg.data.samples import Classes, Sample
from effseg.errors import InputError

Split = Literal["train", "val", "trainval", "train_aug"]
_AUG_LISTS = ("train_aug.txt", "trainaug.txt")


def find_voc(root: str | Path | None = None) -> Path:
    """Find the folder ``VOC2012`` (the one that holds ``JPEGImages`` and ``ImageSets``).

    Args:
        root: a folder that holds ``VOCdevkit/VOC2012``, or ``VOCdevkit``, or ``VOC2012`` itself.
            None looks at the variable ``EFFSEG_DATA``, and without it at ``./datasets``.

    Raises:
        InputError: no such folder; the message names the layout and the places looked at.
    """
    base = resources.data_root(root)
    places = (base / "VOCdevkit" / "VOC2012", base / "VOC2012", base)
    for place in places:
        if (place / "ImageSets" / "Segmentation").is_dir() and (place / "JPEGImages").is_dir():
            return place
    raise InputError(
        f"{base}: no VOC 2012 here; expected VOCdevkit/VOC2012/{{JPEGImages,SegmentationClass,"
        f"ImageSets/Segmentation}}; looked at {', '.join(str(place) for place in places)} "
        "(set the root, or the variable EFFSEG_DATA)"
    )


class VOCSegmentation(PairDataset):
    """Photos and masks of VOC 2012.

    ``train_aug`` is (VOC train + SBD train + SBD val) without VOC val, 10,582 photos in full. It is
    read from a ready ``SegmentationClassAug`` folder (with ``train_aug.txt`` or ``trainaug.txt``
    where there is one), otherwise from SBD's original files, ``benchmark_RELEASE/dataset``, below
    the root or beside ``VOCdevkit``. A VOC train photo without a mask in ``SegmentationClassAug``
    takes the official one.

    Samples: ``image`` (3, H, W) uint8 RGB, ``mask`` (H, W) uint8 with 0 … 20 and 255, and with
    ``boxes=True`` also ``boxes`` (N, 4) float32 as x1 y1 x2 y2 in pixels (x2, y2 exclusive),
    ``labels`` (N,) int64 0 … 19 and ``difficult`` (N,) bool.

    Sources: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).

    Args:
        root: see :func:`find_voc`.
        split: ``train``, ``val``, ``trainval`` or ``train_aug``.
        transform: a function from a sample to a sample.
        boxes: read ``Annotations/*.xml`` too.
        check_files: look for all files now; see :class:`PairDataset`.

    Raises:
        InputError: unknown split, no VOC at the root, an empty list, a missing file, or a
            training list that shares a photo with val.
    """

    card = "voc2012"

    def __init__(
        self,
        root: str | Path | None = None,
        split: Split = "train",
        transform: Transform | None = None,
        boxes: bool = False,
        check_files: bool = True,
    ) -> None:
        """Find the files of the split and check that all are there."""
        if split not in get_args(Split):
            raise InputError(f"split {split!r}: expected one of {', '.join(get_args(Split))}")
        voc = find_voc(root)
        source = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
        pairs = _train_aug(voc) if split == "train_aug" else _official(voc, read_lines(source))
        super().__init__(pairs, Classes.from_card(self.card), transform, source, check_files)
        self.voc = voc
        self.split = split
        self.boxes = boxes
        if boxes:
            self.tasks = ("segmentation", "detection")
        if split in ("train", "train_aug"):
            _check_disjoint(self.pairs, voc, source)
        if boxes and check_files:
            annotations = [voc / "Annotations" / f"{pair.id}.xml" for pair in self.pairs]
            look_for(annotations, "annotation", source)

    def read(self, index: int) -> Sample:
        """Read sample ``index`` as it lies on disk, without the transform."""
        sample = super().read(index)
        if self.boxes:
            path = self.voc / "Annotations" / f"{sample['id']}.xml"
            sample.update(read_boxes(path, self.classes))
        return sample


def read_boxes(path: Path, classes: Classes) -> Sample:
    """Read the boxes of a VOC annotation file.

    VOC counts pixels from 1 and includes the last one; the result counts from 0 and excludes it.

    Returns:
        ``boxes`` (N, 4) float32, ``labels`` (N,) int64 (class index - 1) and ``difficult`` (N,).

    Raises:
        InputError: the file is missing or no VOC XML, or names an unknown class.
    """
    boxes: list[list[float]] = []
    labels: list[int] = []
    difficult: list[bool] = []
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        for entry in objects:
            name = entry.findtext("name", "").strip()
            if name not in classes.names[1:]:
                known = ", ".join(classes.names[1:])
                raise InputError(f"{path}: object {name!r}, expected one of {known}")
            keys = ("xmin", "ymin", "xmax", "ymax")
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}", "")) for key in keys)
            boxes.append([x1 - 1, y1 - 1, x2, y2])
            labels.append(classes.names.index(name) - 1)
            difficult.append(entry.findtext("difficult", "0").strip() == "1")
    except InputError:
        raise
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path}: no VOC annotation: {error}") from error
    return Sample(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        difficult=torch.tensor(difficult, dtype=torch.bool),
    )


def _official(voc: Path, ids: list[str]) -> list[Pair]:
    photos, masks = voc / "JPEGImages", voc / "SegmentationClass"
    return [Pair(name, photos / f"{name}.jpg", masks / f"{name}.png") for name in ids]


def _train_aug(voc: Path) -> list[Pair]:
    if (voc / "SegmentationClassAug").is_dir():
        return _from_folder(voc)
    for base in (voc, *_parents(voc)):
        sbd = base / "benchmark_RELEASE" / "dataset"
        if (sbd / "cls").is_dir():
            return _from_sbd(voc, sbd)
    raise InputError(
        f"{voc}: no masks for train_aug; expected {voc / 'SegmentationClassAug'}, or SBD's "
        f"benchmark_RELEASE/dataset in {', '.join(str(p) for p in (voc, *_parents(voc)))}"
    )


def _parents(voc: Path) -> Iterator[Path]:
    yield voc.parent
    if voc.parent.name == "VOCdevkit":
        yield voc.parent.parent


def _from_folder(voc: Path) -> list[Pair]:
    lists, folder = voc / "ImageSets" / "Segmentation", voc / "SegmentationClassAug"
    there = set(os.listdir(folder))
    found = [lists / name for name in _AUG_LISTS if (lists / name).is_file()]
    if found:
        ids = read_lines(found[0])
    else:
        # A ready folder usually holds the masks of val as well.
        val = set(read_lines(lists / "val.txt"))
        ids = sorted({Path(name).stem for name in there if name.endswith(".png")} - val)
    train = lists / "train.txt"
    official = set(read_lines(train)) if train.is_file() else set()
    pairs = []
    for name in ids:
        lacking = f"{name}.png" not in there and name in official
        masks = voc / "SegmentationClass" if lacking else folder
        pairs.append(Pair(name, voc / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png"))
    return pairs


def _from_sbd(voc: Path, sbd: Path) -> list[Pair]:
    lists = voc / "ImageSets" / "Segmentation"
    official = read_lines(lists / "train.txt")
    added = {*read_lines(sbd / "train.txt"), *read_lines(sbd / "val.txt")}
    added -= {*official, *read_lines(lists / "val.txt")}
    photos = set(os.listdir(voc / "JPEGImages"))
    pairs = _official(voc, official)
    for name in sorted(added):
        file = f"{name}.jpg"
        image = (voc / "JPEGImages" if file in photos else sbd / "img") / file
        pairs.append(Pair(name, image, sbd / "cls" / f"{name}.mat"))
    return sorted(pairs, key=lambda pair: pair.id)


def _check_disjoint(pairs: list[Pair], voc: Path, source: Path) -> None:
    path = voc / "ImageSets" / "Segmentation" / "val.txt"
    if not path.is_file():
        return
    val = set(read_lines(path))
    shared = [pair.id for pair in pairs if pair.id in val]
    if shared:
        raise InputError(
            f"{source}: {shared[0]} is in val too ({len(shared)} shared photos); "
            "expected a training list without the photos of val"
        )
