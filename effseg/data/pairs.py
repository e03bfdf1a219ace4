"""A data set of pairs: a photo and its mask, and, where there are any, its boxes."""

# H W pixels, N boxes

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from effseg.data.dataset import PhotoDataset, Transform
from effseg.data.files import read_image, read_mask
from effseg.data.samples import Classes, Sample, TaskName
from effseg.errors import InputError


@dataclass(frozen=True)
class Pair:
    """Where one sample lies."""

    id: str
    image: Path
    mask: Path


class PairDataset(PhotoDataset):
    """Photos and masks read from files, one sample a pair.

    All files are looked for at once, so that a missing one shows before training and not in its
    third hour; contents are checked as they are read.

    Args:
        pairs: the files.
        classes: the class list, background first.
        transform: a function from a sample to a sample, or None.
        source: what to call the set in an error, usually its list file or folder.
        check_files: look for all files now. False leaves it to the reading, for
            :func:`effseg.data.check.check`, which lists every missing file.

    Raises:
        InputError: no pairs, or files are missing (the first is named, all are counted).
    """

    tasks: tuple[TaskName, ...] = ("segmentation",)

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: Classes,
        transform: Transform | None,
        source: Path,
        check_files: bool = True,
    ) -> None:
        """Check that every file exists."""
        if not pairs:
            raise InputError(f"{source}: no photos found, expected at least one")
        if check_files:
            look_for([pair.image for pair in pairs], "photo", source)
            look_for([pair.mask for pair in pairs], "mask", source)
        super().__init__(classes, transform, source)
        self.pairs = list(pairs)

    @property
    def ids(self) -> list[str]:
        """The photos' ids."""
        return [pair.id for pair in self.pairs]

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.pairs)

    def read(self, index: int) -> Sample:
        """Read sample ``index`` as it lies on disk, without the transform.

        Raises:
            InputError: a file is truncated or corrupt, the mask's size is not the photo's, or the
                mask holds a value that is neither a class nor 255.
        """
        pair = self.pairs[index]
        image = read_image(pair.image)
        mask = read_mask(pair.mask, self.classes)
        if image.shape[1:] != mask.shape:
            raise InputError(
                f"{pair.mask}: mask of {_size(mask)} pixels, expected {_size(image)} "
                f"as its photo {pair.image}"
            )
        return Sample(id=pair.id, image=image, mask=mask)


def _size(tensor: torch.Tensor) -> str:
    height, width = tensor.shape[-2:]
    return f"{width}x{height}"


def look_for(paths: Sequence[Path], kind: str, source: Path) -> None:
    """Check that files exist.

    Raises:
        InputError: some do not; the first is named, all are counted.
    """
    # One listing a folder: ten thousand single look-ups take minutes on a network drive.
    listings = {
        folder: set(os.listdir(folder)) if folder.is_dir() else set[str]()
        for folder in {path.parent for path in paths}
    }
    missing = [path for path in paths if path.name not in listings[path.parent]]
    if missing:
        count = f"{len(missing)} of {len(paths)} {kind}s missing"
        raise InputError(f"{missing[0]}: {kind} not found ({count}, wanted by {source})")
