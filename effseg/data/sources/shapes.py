"""The built-in miniature: images of drawn shapes in VOC's layout, made from a seed in seconds."""

# H W pixels, K classes, N boxes

import json
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from effseg.data.classes import Classes, voc_colour
from effseg.data.files import writing
from effseg.data.sources.drawing import draw_image
from effseg.data.sources.voc import VOC
from effseg.errors import InputError

_STAMP = "shapes.json"
_CONTENT = {_STAMP, "JPEGImages", "SegmentationClass", "Annotations", "ImageSets"}
_VERSION = 1
"""To be raised with every change of the drawing, so that existing folders are redrawn."""

Share = tuple[float, float]


class Shapes(VOC):
    """The miniature, drawn on the first use: background and six shapes, with masks and boxes.

    Only the outline tells the class: colours and textures are random, sizes vary by a factor of 2,
    shapes are rotated, distorted and cover each other.

    Args:
        root: folder to draw in; None takes `default_folder`.
        split: `train`, `val` or `trainval`.
        masks: range (from, to) of the images, as fractions 0 … 1, with masks; None: no masks.
        boxes: the same for boxes. Images with neither are not in the source.
        train: number of training images.
        val: number of evaluation images.
        size: (H, W) of the images in pixels.
        seed: seed of the images and labels.

    Raises:
        InputError: as `VOC` and `write_shapes`, or a range outside 0 … 1.
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
        super().__init__(root, None if masks is None else split, None if boxes is None else split)
        for key, share in (("masks", masks), ("boxes", boxes)):
            if share is not None and not 0 <= share[0] < share[1] <= 1:
                raise InputError(f"{key} {share}: expected a share from and to, 0 to 1")
        self.shares = {"masks": masks, "boxes": boxes}
        self.drawing: dict[str, Any] = {"train": train, "val": val, "size": size, "seed": seed}

    def _root(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        folder = default_folder()
        if self.drawing == Shapes().drawing:
            return folder
        # A folder for each: redrawing one would remove the images that another run reads.
        numbers = [self.drawing[key] for key in ("train", "val", "seed")]
        return folder.with_name("-".join(map(str, [folder.name, *numbers, *self.drawing["size"]])))

    def __str__(self) -> str:
        """Return the class, the split and the folder."""
        return f"Shapes ({self.masks or self.boxes}) at {self._root()}"

    def prepare(self) -> None:
        """Draw the miniature, unless it exists; raises as `write_shapes`."""
        write_shapes(self._root(), **self.drawing)

    @cached_property
    def _masks(self) -> dict[str, Path]:
        return _part(super()._masks, self.shares["masks"])

    @cached_property
    def _annotations(self) -> dict[str, Path]:
        return _part(super()._annotations, self.shares["boxes"])

    @cached_property
    def ids(self) -> list[str]:
        """The images' ids, as `train_00012`."""
        return sorted(self._masks | self._annotations)


def _part(files: dict[str, Path], share: Share | None) -> dict[str, Path]:
    first, last = (round(end * len(files)) for end in share or (0, 0))
    return dict(list(files.items())[first:last])


def drawn_settings(folder: str | Path | None) -> dict[str, Any] | None:
    """Return the settings by which `write_shapes` made a folder; None for any other folder."""
    stamp = None if folder is None else _read_stamp(Path(folder))
    if stamp is None:
        return None
    size = stamp["height"], stamp["width"]
    return {"size": size} | {key: stamp[key] for key in ("train", "val", "seed")}


def default_folder() -> Path:
    """Return `datasets/shapes` if the working folder has a `datasets`, otherwise a user cache."""
    if Path("datasets").is_dir():
        return Path("datasets") / "shapes"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "effseg" / "shapes"


def write_shapes(
    folder: str | Path,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
) -> Path:
    """Draw the miniature of these settings (see `Shapes`), unless the folder has it already.

    The folder has the layout of `VOC2012`. Image `i` of a split depends on the seed, the split, `i`
    and the size only, so a larger set continues a smaller one. A miniature drawn with other
    settings is replaced.

    Returns:
        The folder.

    Raises:
        InputError: a count or size is too small, or the folder contains something else.
    """
    if min(train, val) < 1 or min(size) < 64:
        raise InputError(
            f"shapes: train {train}, val {val}, size {size}; expected at least 1 image each "
            "and 64 pixels a side"
        )
    target = Path(folder).expanduser()
    settings = {"train": train, "val": val, "height": size[0], "width": size[1], "seed": seed}
    settings["version"] = _VERSION
    existing = _read_stamp(target)
    if existing == settings:
        return target
    with writing(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            if existing is None or {path.name for path in target.iterdir()} - _CONTENT:
                raise InputError(f"{target}: holds other files, expected a new folder")
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shapes-", dir=target.parent) as temporary:
            folder = Path(temporary) / target.name
            _write(folder, settings)
            try:
                if target.is_dir():  # empty; Windows renames to no existing name
                    target.rmdir()
                folder.rename(target)
            except OSError:
                if _read_stamp(target) != settings:  # else another process drew it meanwhile
                    raise
    return target


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    keys = {"train", "val", "height", "width", "seed", "version"}
    return content if isinstance(content, dict) and content.keys() == keys else None


def _write(folder: Path, settings: dict[str, int]) -> None:
    for name in ("JPEGImages", "SegmentationClass", "Annotations"):
        (folder / name).mkdir(parents=True)
    names = Classes.from_card(str(Shapes.card)).names[1:]
    palette = [value for index in range(256) for value in voc_colour(index)]
    size = settings["height"], settings["width"]
    lists: dict[str, list[str]] = {}
    for number, split in enumerate(("train", "val")):
        lists[split] = [f"{split}_{index:05d}" for index in range(settings[split])]
        for index, name in enumerate(lists[split]):
            rng = np.random.default_rng([settings["seed"], number, index])
            drawn = draw_image(rng, size, names)
            Image.fromarray(drawn.image).save(folder / f"JPEGImages/{name}.jpg", quality=92)
            mask = Image.fromarray(drawn.mask)
            mask.putpalette(palette)
            mask.save(folder / f"SegmentationClass/{name}.png")
            text = _annotation(name, size, drawn.boxes)
            (folder / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")
    lists["trainval"] = lists["train"] + lists["val"]
    for kind in ("Segmentation", "Main"):
        (folder / "ImageSets" / kind).mkdir(parents=True)
        for split, ids in lists.items():
            path = folder / "ImageSets" / kind / f"{split}.txt"
            path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    (folder / _STAMP).write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _annotation(name: str, size: tuple[int, int], boxes: list[tuple[str, list[int]]]) -> str:
    # VOC counts from 1 and includes the last pixel.
    objects = "".join(
        f"\t<object>\n\t\t<name>{label}</name>\n\t\t<difficult>0</difficult>\n"
        f"\t\t<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n\t</object>\n"
        for label, (x1, y1, x2, y2) in boxes
    )
    return (
        f"<annotation>\n\t<folder>shapes</folder>\n\t<filename>{name}.jpg</filename>\n"
        f"\t<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>\n"
        f"\t<segmented>1</segmented>\n{objects}</annotation>\n"
    )
