"""Your own data: a folder of images, a folder of masks, and a list of class names."""

# H W pixels, K classes

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from effseg import resources
from effseg.data.classes import Classes, load_classes
from effseg.data.files import IMAGE_SUFFIXES, read_mask
from effseg.data.sample import Sample, TaskName
from effseg.data.sources.source import Flags, Source
from effseg.errors import InputError

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


class Folder(Source):
    """Images in one folder and masks in another, matched by file name without the suffix.

    A mask holds class indices (palette or grey PNG) or the colours of the class list (RGB PNG);
    255 is ignored.

    Args:
        root: the folder that the next paths start from; None: as for the other formats.
        classes: the names, background first, or a file of them, see
            :func:`effseg.data.classes.load_classes`; None: the data module's.
        split: what stands for ``{split}`` in the paths; None: nothing, the files lie in the
            folders themselves.
        images: folder of the images.
        masks: folder of the masks.
        mask_suffix: what a mask's name has after its image's, as ``_mask``.

    Raises:
        InputError: when files are asked for: a folder is missing or empty, an image has no mask or
            a mask no image, two files share a name, or the class list is missing or unusable; on
            reading: a file that is missing or broken, or a mask that is not the image's size.
    """

    tasks: tuple[TaskName, ...] = ("segmentation",)

    def __init__(
        self,
        root: str | Path | None = None,
        classes: Sequence[str] | str | None = None,
        split: str | None = "train",
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        mask_suffix: str = "",
    ) -> None:
        """Keep the settings."""
        self.root, self.split = root, split
        self.images, self.masks, self.mask_suffix = images, masks, mask_suffix
        self._listed = classes

    def complete(self, root: str | Path | None, classes: Sequence[str] | str | None) -> None:
        """Take the data module's root and classes, if the source has none of its own."""
        super().complete(root, classes)
        self._listed = classes if self._listed is None else self._listed

    @cached_property
    def classes(self) -> Classes:  # type: ignore[override]
        """The class list, background first."""
        if self._listed is None:
            raise InputError(
                f"{self}: no class list, expected classes: the names, background first, or a file"
            )
        return load_classes(self._listed)

    def _folder(self, pattern: str) -> Path:
        return resources.data_root(self.root) / pattern.replace("{split}", self.split or "")

    @cached_property
    def _files(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Images and masks by name."""
        folders = self._folder(self.images), self._folder(self.masks)
        for folder in folders:
            if not folder.is_dir():
                raise InputError(
                    f"{folder}: no such folder; expected images in {folders[0]} "
                    f"and masks of the same names in {folders[1]}"
                )
        images = _by_stem(folders[0], IMAGE_SUFFIXES, "image")
        masks = _by_stem(folders[1], _MASK_SUFFIXES, "mask", self.mask_suffix)
        return images, masks

    @cached_property
    def ids(self) -> list[str]:
        """The names of the images, and of masks without one."""
        images, masks = self._files
        return sorted(images.keys() | masks.keys())

    def has(self, task: TaskName) -> Flags:
        """Return all for segmentation: every image has a mask."""
        return np.full(len(self.ids), task in self.tasks)

    def __str__(self) -> str:
        """Return the class and the folder of the images."""
        return f"Folder at {self._folder(self.images)}"

    def verify(self) -> None:
        """Look for partners.

        Raises:
            InputError: an image has no mask, or a mask no image; the first is named.
        """
        images, masks = self._files
        _check_partners(images, masks, "mask", self._folder(self.masks))
        _check_partners(masks, images, "image", self._folder(self.images))

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        name = self.ids[index]
        return self._files[0].get(name, self._folder(self.images) / f"{name}.jpg")

    def _mask_path(self, index: int) -> Path:
        name = self.ids[index]
        missing = self._folder(self.masks) / f"{name}{self.mask_suffix}.png"
        return self._files[1].get(name, missing)

    def read_labels(self, index: int) -> Sample:
        """Return the mask; raises as the class says."""
        return Sample(mask=read_mask(self._mask_path(index), self.classes))

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the file of the mask."""
        return str(self._mask_path(index))


def _by_stem(
    folder: Path, suffixes: tuple[str, ...], kind: str, ending: str = ""
) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in suffixes:
            raise InputError(f"{path}: no {kind}; expected one of {', '.join(suffixes)}")
        if not path.stem.endswith(ending):
            raise InputError(f"{path}: expected a name that ends with {ending!r}")
        name = path.stem.removesuffix(ending)
        if name in found:
            raise InputError(f"{path}: a second {kind} of this name, beside {found[name].name}")
        found[name] = path
    if not found:
        raise InputError(f"{folder}: no {kind}s found, expected at least one")
    return found


def _check_partners(
    files: dict[str, Path], partners: dict[str, Path], kind: str, folder: Path
) -> None:
    alone = sorted(files.keys() - partners.keys())
    if alone:
        raise InputError(
            f"{files[alone[0]]}: its {kind} {alone[0]}.* is missing in {folder} "
            f"({len(alone)} of {len(files)} without one)"
        )
