"""The built-in miniature: images of drawn shapes in VOC's layout, made from a seed in seconds."""

# H W pixels, K classes, N boxes

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from effseg.data.classes import Classes, voc_colour
from effseg.data.sources.drawing import draw_image
from effseg.data.sources.voc import VOC, VOCFiles, find_voc
from effseg.errors import InputError

_STAMP = "shapes.json"
_VERSION = 1
"""Raise it with every change of the drawing: folders drawn before are then drawn anew."""

Share = tuple[float, float]


class Shapes(VOC):
    """The miniature, drawn on the first use: background and six shapes, with masks and boxes.

    The class is the outline alone: colours and textures are random, on shapes and background alike,
    sizes vary by 2, shapes are turned, squashed and cover others.

    Args:
        root: folder to draw in; None takes `default_folder`.
        split: `train`, `val` or `trainval`.
        masks: range (from, to) of the images, as fractions 0 … 1, with masks; None: no masks.
        boxes: the same for boxes. Images with neither are not in the source.
        train: number of training images.
        val: number of evaluation images.
        size: (H, W) of the images in pixels.
        seed: of everything drawn.

    Raises:
        InputError: as `VOC` and `write_shapes`, or a share that is none.
    """

    card: str | None = "shapes"

    def __init__(
        self,
        root: str | Path | None = None,
        split: Literal["train", "val", "trainval"] = "train",
        masks: Share | None = (0.0, 1.0),
        boxes: Share | None = (0.0, 1.0),
        train: int = 400,
        val: int = 100,
        size: tuple[int, int] = (192, 256),
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        super().__init__(root, None if masks is None else split, None if boxes is None else split)
        for key, share in (("masks", masks), ("boxes", boxes)):
            if share is not None and not 0 <= share[0] < share[1] <= 1:
                raise InputError(f"{key} {share}: expected a share from and to, 0 to 1")
        self.shares = {"mask": masks, "annotation": boxes}
        self.drawing: dict[str, Any] = {"train": train, "val": val, "size": size, "seed": seed}

    @cached_property
    def folder(self) -> Path:
        """The folder that was drawn."""
        return find_voc(self._root())

    def _root(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        folder = default_folder()
        if self.drawing == Shapes().drawing:
            return folder
        # A folder for each: redrawing one would take the images from a run that reads the other.
        numbers = [self.drawing[key] for key in ("train", "val", "seed")]
        return folder.with_name("-".join(map(str, [folder.name, *numbers, *self.drawing["size"]])))

    def __str__(self) -> str:
        """Return the class, the split and the folder."""
        return f"Shapes ({self.masks or self.boxes}) at {self._root()}"

    def prepare(self) -> None:
        """Draw the miniature unless it is there; raises as `write_shapes`."""
        write_shapes(self._root(), **self.drawing)  # type: ignore[arg-type]

    @cached_property
    def _index(self) -> dict[str, VOCFiles]:
        listed = list(super()._index.items())
        for kind, share in self.shares.items():
            if share is None:
                continue
            first, last = (round(part * len(listed)) for part in share)
            for number, (name, files) in enumerate(listed):
                if not first <= number < last:
                    unlabelled = replace(files, **{kind: None})  # type: ignore[arg-type]
                    listed[number] = name, unlabelled
        return {name: files for name, files in listed if files.mask or files.annotation}


def is_shapes(folder: str | Path | None) -> bool:
    """Return whether `write_shapes` made this folder."""
    return folder is not None and (Path(folder) / _STAMP).is_file()


def default_folder() -> Path:
    """Return the default folder of the miniature.

    `datasets/shapes` where the working folder has a `datasets`, otherwise a user cache.
    """
    if Path("datasets").is_dir():
        return Path("datasets") / "shapes"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "effseg" / "shapes"


@dataclass(frozen=True)
class _Settings:
    train: int
    val: int
    height: int
    width: int
    seed: int
    version: int = _VERSION


def write_shapes(
    folder: str | Path,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
) -> Path:
    """Draw the miniature, or keep it where the folder already holds the same one.

    Image `i` of a split depends on the seed, the split, `i` and the size only, so a larger set
    continues a smaller one. A miniature drawn with other settings is replaced.

    Args:
        folder: becomes the VOC-like folder (`JPEGImages`, `SegmentationClass`, …).
        train: number of training images.
        val: number of evaluation images.
        size: (H, W) of the images in pixels.
        seed: of everything drawn.

    Returns:
        The folder.

    Raises:
        InputError: a count or size is too small, or the folder holds something else.
    """
    if min(train, val) < 1 or min(size) < 64:
        raise InputError(
            f"shapes: train {train}, val {val}, size {size}; expected at least 1 image each "
            "and 64 pixels a side"
        )
    target = Path(folder).expanduser()
    settings = _Settings(train, val, size[0], size[1], seed)
    if _read_stamp(target) == vars(settings):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if _read_stamp(target) is None:
            raise InputError(f"{target}: holds other files, expected a new folder for the shapes")
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".shapes-", dir=target.parent))
    try:
        _write(temporary, settings)
        temporary.chmod(0o755)  # mkdtemp keeps it private
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if _read_stamp(target) != vars(settings):  # else another process drew it meanwhile
            raise
    return target


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write(folder: Path, settings: _Settings) -> None:
    classes = Classes.from_card(str(Shapes.card))
    names = ("JPEGImages", "SegmentationClass", "Annotations")
    for name in (*names, "ImageSets/Segmentation", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    palette = _palette(classes)
    lists: dict[str, list[str]] = {}
    for number, (split, count) in enumerate((("train", settings.train), ("val", settings.val))):
        lists[split] = [f"{split}_{index:05d}" for index in range(count)]
        for index, name in enumerate(lists[split]):
            rng = np.random.default_rng([settings.seed, number, index])
            size = (settings.height, settings.width)
            drawn = draw_image(rng, size, classes.names[1:])
            Image.fromarray(drawn.image).save(folder / f"JPEGImages/{name}.jpg", quality=92)
            mask = Image.fromarray(drawn.mask)
            mask.putpalette(palette)
            mask.save(folder / f"SegmentationClass/{name}.png")
            text = _annotation(name, size, drawn.boxes)
            (folder / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")
    lists["trainval"] = lists["train"] + lists["val"]
    for split, ids in lists.items():
        for kind in ("Segmentation", "Main"):
            path = folder / "ImageSets" / kind / f"{split}.txt"
            path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    (folder / _STAMP).write_text(json.dumps(vars(settings)) + "\n", encoding="utf-8")


def _palette(classes: Classes) -> list[int]:
    colours = [voc_colour(index) for index in range(256)]
    colours[: len(classes)] = classes.palette
    return [value for colour in colours for value in colour]


def _annotation(name: str, size: tuple[int, int], boxes: list[tuple[str, list[int]]]) -> str:
    lines = [
        "<annotation>",
        "\t<folder>shapes</folder>",
        f"\t<filename>{name}.jpg</filename>",
        f"\t<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>",
        "\t<segmented>1</segmented>",
    ]
    for label, (x1, y1, x2, y2) in boxes:
        # VOC counts from 1 and includes the last pixel.
        edges = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        lines += [
            "\t<object>",
            f"\t\t<name>{label}</name>",
            "\t\t<difficult>0</difficult>",
            f"\t\t<bndbox>{edges}</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
