"""Custom data: a folder of images, a folder of masks, and a list of class names."""

# H W pixels, K classes

import hashlib
from collections.abc import Sequence, Set
from functools import cached_property
from pathlib import Path

from effseg import resources
from effseg.data.classes import Classes, load_classes
from effseg.data.files import IMAGE_SUFFIXES, MASK_SUFFIXES, is_white_class, read_mask
from effseg.data.listing import by_name, walk
from effseg.data.sample import Sample, TaskName
from effseg.data.sources.labelme import read_labelme
from effseg.data.sources.source import Source
from effseg.errors import InputError, note

LABELME = ".json"
VAL_SHARE = 0.2


class Folder(Source):
    """Images in one folder and masks in another, matched by path and name without the suffix.

    A mask contains class indices (palette or greyscale PNG) or the colours of the class list (RGB
    PNG); 255 is ignored. labelme's `.json` files are drawn. Images and masks may share a folder:
    masks are then the files that end with `mask_suffix`, or labelme's files.

    Args:
        root: folder that the other paths are relative to; None: as for the other formats.
        classes: the names, background first, or a file of them, see
            `effseg.data.classes.load_classes`; None: the data module's.
        split: replaces `{split}` in the paths; None: no sub-folders of splits.
        images: folder of the images.
        masks: folder of the masks.
        mask_suffix: suffix of a mask's name after its image's, such as `_mask`.
        binary: with two classes, masks contain 0 and 255, and 255 is the second class; False: it
            is ignored. None: it is the second class if no mask of the training set contains a 1.
        val_share: fraction of the images in the folders without `{split}` to draw as `val`, by
            `seed`; the rest are `train`, without those in a folder `test` in place of `{split}`.
            None: 0.2 if there is no folder of the split, but images in its parent folder.
        seed: seed of that draw.

    Raises:
        InputError: on first access: a folder is missing or empty, an image has no mask or a mask
            no image, two files share a name, or the class list is missing or invalid; on reading:
            a file is missing or broken, or a mask differs in size from its image.
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
        binary: bool | None = None,
        val_share: float | None = None,
        seed: int = 0,
    ) -> None:
        self.root, self.split = root, split
        self.images, self.masks, self.mask_suffix = images, masks, mask_suffix
        self.val_share, self.seed = val_share, seed
        if val_share is not None and not 0 < val_share < 1:
            raise InputError(f"val_share={val_share}: expected a share between 0 and 1")
        if val_share is not None and split not in ("train", "val"):
            raise InputError(f"val_share with split {split!r}: expected train or val")
        self._listed, self._binary = classes, binary

    def complete(self, root: str | Path | None, classes: Sequence[str] | str | None) -> None:
        """Use the data module's root and classes if the source has none."""
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

    def _path(self, pattern: str, split: str | None) -> Path:
        return resources.data_root(self.root) / pattern.replace("{split}", split or "")

    @cached_property
    def _is_random_split(self) -> bool:
        """Whether the split is drawn from one folder."""
        if self.val_share is not None or self.split not in ("train", "val"):
            return self.val_share is not None
        parent, root = self._path(self.images, None), resources.data_root(self.root)
        return (
            "{split}" in self.images
            and not any(self._path(self.images, split).is_dir() for split in ("train", "val"))
            and _has_images(parent, nested=parent != root)
        )

    @cached_property
    def _folders(self) -> tuple[Path, Path]:
        """The folders of the images and of the masks."""
        split = None if self._is_random_split else self.split
        return self._path(self.images, split), self._path(self.masks, split)

    @cached_property
    def _files(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Images and masks by name."""
        for folder in self._folders:
            if not folder.is_dir():
                raise InputError(
                    f"{folder}: no such folder; expected images in {self._folders[0]} and masks "
                    f"of the same names in {self._folders[1]} (val_share draws a split)"
                )
        self._note_left_out()
        image_folder, mask_folder = self._folders
        # Without a split, folders beside the images are other splits.
        nested = self.split is not None or not _has_images(image_folder, nested=False)
        shared, ending = image_folder == mask_folder, self.mask_suffix
        beside = ending if shared else None
        images = by_name(image_folder, IMAGE_SUFFIXES, "image", "", beside, nested, mask_folder)
        suffixes = (LABELME,) if shared and not ending else (*MASK_SUFFIXES, LABELME)
        beside = "" if shared else None
        masks = by_name(mask_folder, suffixes, "mask", ending, beside, nested, image_folder)
        if self._is_random_split:
            names = images.keys() | masks.keys()
            test = {name for name in names if name.startswith("test/")}
            if test and self.images.endswith("{split}"):  # a split of its own
                note(f"{image_folder / 'test'}: {len(test)} images of the split test", once=True)
                names -= test
            drawn = self._draw_split(names)
            images = {name: path for name, path in images.items() if name in drawn}
            masks = {name: path for name, path in masks.items() if name in drawn}
        return images, masks

    def _note_left_out(self) -> None:
        """Say how many files lie beside the folders of the splits, and so in none."""
        for pattern, suffixes in ((self.images, IMAGE_SUFFIXES), (self.masks, MASK_SUFFIXES)):
            if not pattern.endswith("/{split}") or self.split is None or self._is_random_split:
                continue
            parent = self._path(pattern, None)
            count = sum(p.suffix.lower() in suffixes for p in walk(parent, nested=False))
            if count:
                note(f"{parent}: {count} files beside the folders of splits left out", once=True)

    def _draw_split(self, names: Set[str]) -> Set[str]:
        """Return the names of the split, drawn by a hash, so that new images move few others."""
        if len(names) < 2:
            images = f"{len(names)} image{'' if len(names) == 1 else 's'}"
            raise InputError(f"{self}: {images}, expected at least 2 to draw train and val from")
        order = sorted(names, key=lambda n: hashlib.sha256(f"{self.seed}/{n}".encode()).digest())
        share = self.val_share or VAL_SHARE
        count = min(len(names) - 1, max(1, round(share * len(names))))
        if self.split == "train":
            return {*order[count:]}
        note(f"{self}: {count} of {len(names)} images drawn for val (seed {self.seed})", once=True)
        return {*order[:count]}

    @cached_property
    def ids(self) -> list[str]:
        """The names of the images, and of masks without one."""
        images, masks = self._files
        return sorted(images.keys() | masks.keys())

    def __str__(self) -> str:
        """Return the class and the folder of the images."""
        return f"Folder at {self._folders[0]}"

    def verify(self) -> None:
        """Check that every image has a mask, and every mask an image.

        Raises:
            InputError: one has not; the first is named, with their number.
        """
        images, masks = self._files
        for kind, files, others, folder in (
            ("mask", images, masks, self._folders[1]),
            ("image", masks, images, self._folders[0]),
        ):
            unpaired = sorted(files.keys() - others.keys())
            if unpaired:
                raise InputError(
                    f"{files[unpaired[0]]}: its {kind} {unpaired[0]}.* is missing in {folder} "
                    f"({len(unpaired)} of {len(files)} without one)"
                )

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        name = self.ids[index]
        return self._files[0].get(name, self._folders[0] / f"{name}.jpg")

    def _mask_path(self, index: int) -> Path:
        name = self.ids[index]
        return self._files[1].get(name, self._folders[1] / f"{name}{self.mask_suffix}.png")

    def settle(self, train: Sequence[Source] = ()) -> None:
        """Decide what 255 means, by the masks of this source or as the training sources did."""
        if self._binary is None:
            decided = {
                source.binary
                for source in train
                if isinstance(source, Folder) and source.classes.names == self.classes.names
            }
            self._binary = decided.pop() if len(decided) == 1 else self.binary

    @cached_property
    def binary(self) -> bool:
        """Whether 255 is class 1: there are two classes, and masks hold 0 and 255 but no 1."""
        if self._binary and len(self.classes) != 2:
            raise InputError(f"{self}: binary with {len(self.classes)} classes, expected 2")
        if self._binary is not None or len(self.classes) != 2:
            return bool(self._binary)
        paths = [path for path in self._files[1].values() if path.suffix.lower() != LABELME]
        binary = is_white_class(paths, self.classes)
        if binary:
            note(
                f"{self}: masks contain 0 and 255 but no 1, so 255 is class 1, "
                f"{self.classes.names[1]!r} (binary: false reads it as ignored)"
            )
        return binary

    def read_labels(self, index: int) -> Sample:
        """Return the mask; raises as the class says."""
        path = self._mask_path(index)
        if path.suffix.lower() == LABELME:
            return Sample(mask=read_labelme(path, self.classes))
        return Sample(mask=read_mask(path, self.classes, self.binary))

    def where(self, index: int, task: TaskName, number: int | None = None) -> str:
        """Return the file of the mask."""
        return str(self._mask_path(index))


def _has_images(folder: Path, nested: bool) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in walk(folder, nested))
