"""Data sets whose labels are brought to one label space, and joined photo by photo."""

# H W pixels, N boxes, K classes of the space

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from effseg.data.dataset import PhotoDataset, Transform
from effseg.data.files import decode_once
from effseg.data.label_space import UNMAPPED, Background, LabelSpace
from effseg.data.samples import IGNORE_INDEX, TASKS, Sample, TaskName, keep_boxes
from effseg.errors import InputError


class Mapped(PhotoDataset):
    """A data set with its labels in a label space; samples also carry ``known``.

    Boxes of classes outside the space are dropped; so are crowds of such classes.

    Args:
        dataset: with masks, boxes, or both.
        space: the label space.
        background: see :data:`effseg.data.label_space.Background`.

    Raises:
        InputError: the data set has no class of the space.
    """

    def __init__(
        self, dataset: PhotoDataset, space: LabelSpace, background: Background = "ignore"
    ) -> None:
        """Make the map."""
        super().__init__(space.classes, None, dataset.source)
        self.dataset = dataset
        self.map = space.map(dataset.classes, str(dataset.source), background)
        self.tasks = dataset.tasks

    @property
    def ids(self) -> Sequence[str]:
        """The ids of the data set."""
        return self.dataset.ids

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.dataset)

    def read(self, index: int) -> Sample:
        """Read a sample and map its labels; raises as the data set."""
        sample = self.dataset.read(index)
        if "mask" in sample:
            sample["mask"] = self.map.masks[sample["mask"].long()]
        if "boxes" in sample:
            sample["labels"] = self.map.boxes[sample["labels"]]
            sample["known"] = self.map.known
            keep_boxes(sample, sample["labels"] != UNMAPPED)
        return sample


class Joined(PhotoDataset):
    """The union of data sets over the same photos: a photo has the labels that any of them has.

    Args:
        datasets: with one class list; photos are the same where their ids are.
        transform: a function from a sample to a sample.

    Raises:
        InputError: no data set, or two that give one photo the same kind of label.
    """

    def __init__(
        self, datasets: Sequence[PhotoDataset], transform: Transform | None = None
    ) -> None:
        """Match the photos."""
        if not datasets:
            raise InputError("a data set to join is missing: expected at least one")
        super().__init__(datasets[0].classes, transform, datasets[0].source)
        self.datasets = list(datasets)
        places: dict[str, list[tuple[int, int]]] = {}
        for number, dataset in enumerate(datasets):
            for index, photo_id in enumerate(dataset.ids):
                places.setdefault(photo_id, []).append((number, index))
        self._ids, self.places = list(places), list(places.values())
        self.tasks = tuple(t for t in TASKS if any(t in d.tasks for d in datasets))
        for photo_id, found in places.items():
            labels = [task for number, _ in found for task in datasets[number].tasks]
            if len(set(labels)) < len(labels):
                names = " and ".join(str(datasets[number].source) for number, _ in found)
                raise InputError(f"{names}: both have the same kind of label for photo {photo_id}")

    @property
    def ids(self) -> Sequence[str]:
        """The ids of all photos."""
        return self._ids

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self._ids)

    def photos_for(self, task: TaskName) -> npt.NDArray[np.int64]:
        """Return the indices of the photos that have a label for a task."""
        serving = {n for n, dataset in enumerate(self.datasets) if task in dataset.tasks}
        return np.array(
            [i for i, found in enumerate(self.places) if any(n in serving for n, _ in found)],
            np.int64,
        )

    def read(self, index: int) -> Sample:
        """Read a photo once, and its labels from every data set that has it.

        Raises:
            InputError: as the data sets, or photos of two sizes under one id.
        """
        with decode_once():
            samples = [self.datasets[number].read(i) for number, i in self.places[index]]
        first = samples[0]
        for (number, _), other in zip(self.places[index][1:], samples[1:], strict=True):
            if other["image"].shape != first["image"].shape:
                raise InputError(
                    f"{self.datasets[number].source}: photo {self._ids[index]} is of another size "
                    f"than in {self.source}"
                )
        merged = first.copy()
        for other in samples[1:]:
            merged.update(other)
        return merged


def fill(sample: Sample, classes: int) -> Sample:
    """Give a sample the labels that it lacks, empty, and say which are real.

    ``has_mask`` and ``has_boxes`` are what is real; a missing mask is 255 everywhere, missing boxes
    are none, and no box class is known.
    """
    sample["has_mask"] = torch.tensor("mask" in sample)
    sample["has_boxes"] = torch.tensor("boxes" in sample)
    if "mask" not in sample:
        sample["mask"] = torch.full(sample["image"].shape[1:], IGNORE_INDEX, dtype=torch.uint8)
    if "boxes" not in sample:
        sample["boxes"] = torch.zeros(0, 4)
        sample["labels"] = torch.zeros(0, dtype=torch.int64)
        sample["known"] = torch.zeros(classes - 1, dtype=torch.bool)
    none = torch.zeros(len(sample["boxes"]), dtype=torch.bool)
    sample.setdefault("crowd", none)
    sample.setdefault("difficult", none)
    return sample
