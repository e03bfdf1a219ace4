"""Read a whole data set once and say what is in it and what is wrong with it."""

# H W pixels, K classes

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from effseg.data.dataset import PhotoDataset
from effseg.data.samples import IGNORE_INDEX
from effseg.errors import InputError


@dataclass
class CheckReport:
    """What :func:`check` found."""

    photos: int
    """Listed photos, readable or not."""
    class_names: tuple[str, ...]
    class_pixels: npt.NDArray[np.int64]
    """(K,) pixels of each class over all readable masks."""
    class_photos: npt.NDArray[np.int64]
    """(K,) photos that show each class, in their mask or their boxes."""
    class_boxes: npt.NDArray[np.int64]
    """(K,) boxes of each class; the background has none."""
    ignored_pixels: int
    sizes: Counter[tuple[int, int]]
    """(H, W) in pixels to number of photos."""
    problems: list[str] = field(default_factory=list)
    """One line each, in the order of the data set."""

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return int(self.class_boxes.sum())

    @property
    def class_shares(self) -> npt.NDArray[np.float64]:
        """(K,) share of each class in the labelled pixels, 0 … 1, summing to 1 (or all 0)."""
        shares: npt.NDArray[np.float64] = self.class_pixels / max(int(self.class_pixels.sum()), 1)
        return shares

    @property
    def ignored_share(self) -> float:
        """Share of the ignored pixels in all pixels, 0 … 1."""
        return self.ignored_pixels / max(self.ignored_pixels + int(self.class_pixels.sum()), 1)


@dataclass(frozen=True)
class _Found:
    pixels: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.int64]
    size: tuple[int, int]


def check(dataset: PhotoDataset, workers: int = 8, progress: bool = False) -> CheckReport:
    """Read every sample, in threads, and list all problems rather than only the first.

    Make a data set of masks with ``check_files=False``, so that missing files come into the list as
    well.

    Args:
        dataset: its transform is not used.
        workers: reading threads (decoders work outside Python's lock).
        progress: show a bar.
    """
    names = dataset.classes.names
    total = np.zeros(256, np.int64)
    class_photos = np.zeros(len(names), np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[str] = []
    class_boxes = np.zeros(len(names), np.int64)

    def read(index: int) -> _Found | str:
        try:
            sample = dataset.read(index)
        except InputError as error:
            return str(error)
        mask = sample.get("mask", torch.zeros(0, dtype=torch.uint8))
        labels = sample.get("labels", torch.zeros(0, dtype=torch.int64)) + 1
        height, width = sample["image"].shape[1:]
        return _Found(
            torch.bincount(mask.flatten(), minlength=256).numpy(),
            torch.bincount(labels, minlength=len(names)).numpy(),
            (height, width),
        )

    with ThreadPoolExecutor(workers) as pool:
        results: Iterable[_Found | str] = pool.map(read, range(len(dataset)))
        if progress:
            from rich.progress import track

            results = track(results, "reading", total=len(dataset))
        for found in results:
            if isinstance(found, str):
                problems.append(found)
                continue
            total += found.pixels
            class_photos += (found.pixels[: len(names)] > 0) | (found.boxes > 0)
            class_boxes += found.boxes
            sizes[found.size] += 1
    return CheckReport(
        photos=len(dataset),
        class_names=names,
        class_pixels=total[: len(names)],
        class_photos=class_photos,
        class_boxes=class_boxes,
        ignored_pixels=int(total[IGNORE_INDEX]),
        sizes=sizes,
        problems=problems,
    )
