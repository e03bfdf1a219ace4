"""Read a whole data set once and say what is in it and what is wrong with it."""

# H W pixels, K classes

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from effseg.data.sample import IGNORE_INDEX
from effseg.data.sources.source import Source
from effseg.errors import InputError


@dataclass
class CheckReport:
    """What :func:`check` found."""

    images: int
    """Listed images, readable or not."""
    class_names: tuple[str, ...]
    class_pixels: npt.NDArray[np.int64]
    """(K,) pixels of each class over all readable masks."""
    class_images: npt.NDArray[np.int64]
    """(K,) images that show each class, in their mask or their boxes."""
    class_boxes: npt.NDArray[np.int64]
    """(K,) boxes of each class; the background has none."""
    ignored_pixels: int
    sizes: Counter[tuple[int, int]]
    """(H, W) in pixels to number of images."""
    problems: list[str] = field(default_factory=list)
    """One line each, in the order of the images."""

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return int(self.class_boxes.sum())

    @property
    def absent(self) -> list[str]:
        """The classes without a pixel or a box."""
        counted = zip(self.class_names, self.class_pixels + self.class_boxes, strict=True)
        skipped = self.class_names[0] if not self.class_pixels.any() else None
        return [name for name, count in counted if not count and name != skipped]

    @property
    def nothing(self) -> list[str]:
        """A line where images can be read, but no class after the first has a pixel or a box."""
        if not self.sizes or self.class_pixels[1:].any() or self.boxes:
            return []
        return [f"no pixel or box of any class, expected some of {', '.join(self.class_names[1:])}"]

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


def check(source: Source, workers: int = 8, progress: bool = False) -> CheckReport:
    """Read every image, in threads, and list all problems rather than only the first.

    Args:
        source: its files need not all be there.
        workers: reading threads (decoders work outside Python's lock).
        progress: show a bar.
    """
    listed = {"segmentation": source.mask_classes.names, "detection": source.box_classes.names}
    names = tuple(dict.fromkeys(name for task in source.tasks for name in listed[task]))
    # Masks come first, so their values are numbers in names; boxes may have another list.
    place = torch.tensor(
        [names.index(name) if name in names else 0 for name in listed["detection"]]
    )
    total = np.zeros(256, np.int64)
    class_images = np.zeros(len(names), np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[str] = []
    class_boxes = np.zeros(len(names), np.int64)

    source.settle()

    def read(index: int) -> _Found | str:
        try:
            image = source.image(index)
            height, width = image.shape[1:]
            labels = source.labels(index, (height, width))
        except InputError as error:
            return str(error)
        mask = labels.get("mask", torch.zeros(0, dtype=torch.uint8))
        boxes = place[labels.get("labels", torch.zeros(0, dtype=torch.int64)) + 1]
        return _Found(
            torch.bincount(mask.flatten(), minlength=256).numpy(),
            torch.bincount(boxes, minlength=len(names)).numpy(),
            (height, width),
        )

    with ThreadPoolExecutor(workers) as pool:
        results: Iterable[_Found | str] = pool.map(read, range(len(source)))
        if progress:
            from rich.progress import track

            results = track(results, "reading", total=len(source))
        for found in results:
            if isinstance(found, str):
                problems.append(found)
                continue
            total += found.pixels
            class_images += (found.pixels[: len(names)] > 0) | (found.boxes > 0)
            class_boxes += found.boxes
            sizes[found.size] += 1
    return CheckReport(
        images=len(source),
        class_names=names,
        class_pixels=total[: len(names)],
        class_images=class_images,
        class_boxes=class_boxes,
        ignored_pixels=int(total[IGNORE_INDEX]),
        sizes=sizes,
        problems=problems,
    )
