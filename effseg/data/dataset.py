"""Sources as one data set: one label space, augmented, all samples with the same keys."""

# H W pixels, N boxes, K classes of the space, background included

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset as TorchDataset

from effseg.data.classes import UNMAPPED, Background, Classes, LabelMap, LabelSpace
from effseg.data.files import resolve
from effseg.data.sample import IGNORE_INDEX, TASKS, Sample, TaskName, keep_boxes
from effseg.data.sampling import Draw, Part, Weights, check_weights
from effseg.data.sources.source import Size, Source
from effseg.errors import InputError

Sources = Mapping[str, Source | Sequence[Source]]
Augment = Callable[[Sample, int], Sample]
"""A function from a sample and its position in the stream to a sample of the crop's size."""


_TRIES = 10
"""Images in a row that cannot be read: more are no accident."""


@dataclass(frozen=True)
class _Member:
    """One source in the data set."""

    name: str
    number: int
    """Of the name: sources of a list share it."""
    source: Source
    map: LabelMap
    first: int
    """Number of its first image in the data set."""


class Dataset(TorchDataset[Sample]):
    """The images of several sources, one source after the other.

    Asked for with a number it gives an image as it lies on disk; with an augmentation it takes a
    `effseg.data.sampling.Draw` and gives a crop. All its samples have the same keys, see
    `effseg.data.sample.Sample`: labels of a task that an image lacks are filled in (a mask
    of 255, no boxes, no known class), `real` says which are not.

    Args:
        sources: name to a source, or to a list of sources under one name.
        space: the label space; None: the classes of the sources, which must agree.
        augment: makes crops, see `Augment`; None: whole images.
        background: see `effseg.data.classes.Background`.
        check_files: look for all files now.
        skip_unreadable: where an image cannot be read any more, give the next of its source, and
            say so in the sample's `skipped`; with an augmentation only.

    Raises:
        InputError: no source or no image, sources that disagree on their classes without a space, a
            source with no class of the space, or a missing file.
    """

    def __init__(
        self,
        sources: Sources,
        space: LabelSpace | None = None,
        augment: Augment | None = None,
        background: Background = "ignore",
        check_files: bool = True,
        skip_unreadable: bool = False,
    ) -> None:
        """Put the sources in a row."""
        listed = flatten(sources)
        if not listed:
            raise InputError("no source of images, expected at least one")
        self.names = tuple(sources)
        self.space = common_space(listed) if space is None else space
        self.augment, self.skip_unreadable = augment, skip_unreadable
        self.members: list[_Member] = []
        first = 0
        for name, source in listed:
            if check_files:
                source.verify()
                source.settle()  # before workers do, each for itself
            label_map = self.space.map(
                source.mask_classes, source.box_classes, f"{name}: {source}", background
            )
            number = self.names.index(name)
            self.members.append(_Member(name, number, source, label_map, first))
            first += len(source)
        self.length = first
        if not first:
            raise InputError(f"{', '.join(self.names)}: no images, expected at least one")
        self._starts = np.array([member.first for member in self.members])

    @property
    def classes(self) -> Classes:
        """The classes of the label space, background first."""
        return self.space.classes

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that any source has labels for."""
        return tuple(t for t in TASKS if any(t in m.source.tasks for m in self.members))

    @property
    def ids(self) -> list[str]:
        """The ids of all images."""
        return [image for member in self.members for image in member.source.ids]

    def __len__(self) -> int:
        """Return the number of images."""
        return self.length

    def _place(self, index: int) -> tuple[_Member, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        member = self.members[int(np.searchsorted(self._starts, index, side="right")) - 1]
        return member, index - member.first

    def read(self, index: int) -> Sample:
        """Read an image and the labels that it has, brought to the label space.

        Raises:
            InputError: as the source's `image` and `labels`.
        """
        member, place = self._place(index)
        image = member.source.image(place)
        sample = Sample(id=member.source.ids[place], image=image)
        sample["source"], sample["number"] = member.name, member.number
        sample.update(self.labels(index, (image.shape[1], image.shape[2])))
        sample["real"] = tuple(
            task for task, key in zip(TASKS, ("mask", "boxes"), strict=True) if key in sample
        )
        return sample

    def labels(self, index: int, size: Size | None = None) -> Sample:
        """Read the labels that an image has, brought to the label space; see the source's."""
        member, place = self._place(index)
        found = member.source.labels(place, size)
        if "mask" in found and not member.map.identity:
            found["mask"] = torch.from_numpy(member.map.masks[found["mask"].numpy()])
        if "boxes" in found:
            found["labels"] = member.map.boxes[found["labels"]]
            found["known"] = member.map.known
            keep_boxes(found, found["labels"] != UNMAPPED)
        return found

    def size(self, index: int) -> Size:
        """Return (H, W) of an image without decoding it."""
        member, place = self._place(index)
        return member.source.size(place)

    def annotated(self) -> dict[TaskName, npt.NDArray[np.bool_]]:
        """Return which classes (K,) any source annotates, for each task with labels."""
        found: dict[TaskName, npt.NDArray[np.bool_]] = {}
        for member in self.members:
            tasks = [task for task in TASKS if member.source.has(task).any()]
            for task in tasks:
                drawn = found.setdefault(task, np.zeros(len(self.classes), np.bool_))
                if task == "segmentation":
                    values = member.map.masks[: len(member.source.mask_classes)]
                    drawn[values[values != IGNORE_INDEX]] = True
                else:
                    drawn[1:] |= member.map.known.numpy()
        return found

    def __getitem__(self, index: int | Draw) -> Sample:
        """Read an image; augment it, if the data set does; fill in what it lacks.

        Raises:
            InputError: as `read`.
        """
        if self.augment is None:
            sample = self._filled(self.read(index.image if isinstance(index, Draw) else index))
            sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2] if "boxes" in sample else None
            if sides is not None:
                sample.setdefault("area", sides.prod(1))
            return sample
        draw = index if isinstance(index, Draw) else Draw(index, index)
        read, skipped = self._read_or_next(draw.image)
        sample = self._filled(self.augment(read, draw.position))
        if self.skip_unreadable:
            sample["skipped"] = skipped
        sample["tasks"], sample["freeze"] = draw.tasks or self.tasks, draw.freeze
        for key in ("difficult", "area", "source"):  # nothing of these matters to a loss
            sample.pop(key, None)  # type: ignore[misc]
        return sample

    def _read_or_next(self, index: int) -> tuple[Sample, list[str]]:
        """Read an image, or the next of its source that can be read; and say why not the first."""
        member, place = self._place(index)
        count = len(member.source)
        skipped: list[str] = []
        for number in range(min(count, _TRIES) if self.skip_unreadable else 1):
            try:
                return self.read(member.first + (place + number) % count), skipped
            except (InputError, OSError) as error:
                if not self.skip_unreadable:
                    raise
                skipped.append(str(error))
        raise InputError(f"{skipped[0]}; and {len(skipped) - 1} images after it are unreadable too")

    def _filled(self, sample: Sample) -> Sample:
        if "segmentation" in self.tasks and "mask" not in sample:
            size = sample["image"].shape[1:]
            sample["mask"] = torch.full(size, IGNORE_INDEX, dtype=torch.uint8)
        if "detection" in self.tasks:
            if "boxes" not in sample:
                sample["boxes"] = torch.zeros(0, 4)
                sample["labels"] = torch.zeros(0, dtype=torch.int64)
                sample["known"] = torch.zeros(len(self.classes) - 1, dtype=torch.bool)
            none = torch.zeros(len(sample["boxes"]), dtype=torch.bool)
            sample.setdefault("crowd", none)
            sample.setdefault("difficult", none)
        return sample

    def parts(self, weights: Weights) -> list[Part]:
        """Return the sources as the sampler draws them, a part a name.

        Raises:
            InputError: weights that do not fit, see `effseg.data.sampling.check_weights`.
        """
        given = check_weights(weights, self.names)
        power = 1.0 if weights == "images" else 0.0
        if isinstance(weights, int | float):
            power = 1.0 / weights
        found = []
        for number, name in enumerate(self.names):
            members = [member for member in self.members if member.number == number]
            images = {
                task: np.concatenate(
                    [member.first + np.flatnonzero(member.source.has(task)) for member in members]
                )
                for task in self.tasks
            }
            images = {task: numbers for task, numbers in images.items() if len(numbers)}
            found.append(Part(images, given.get(name, 1.0), power))
        return found

    def check_apart(self, other: "Dataset") -> None:
        """Check that another data set holds none of the images of this one.

        An image is the same where its file is, links followed, or its id under one card.

        Args:
            other: the data set of evaluation.

        Raises:
            InputError: shared images; the first is named, all are counted.
        """
        for mine in self.members:
            files = dict(zip(_files(mine.source), mine.source.ids, strict=True))
            ids = set(mine.source.ids)
            for theirs in other.members:
                pairs = zip(_files(theirs.source), theirs.source.ids, strict=True)
                cards = mine.source.card is not None and mine.source.card == theirs.source.card
                shared = [i for file, i in pairs if file in files or (cards and i in ids)]
                if shared:
                    raise InputError(
                        f"train.{mine.name} and val.{theirs.name} share {len(shared)} of "
                        f"{len(theirs.source)} images, the first is {shared[0]} "
                        f"({mine.source}; {theirs.source}); expected none, or allow_overlap: true"
                    )


def _files(source: Source) -> list[object]:
    return [*resolve([source.image_path(index) for index in range(len(source))])]


def flatten(sources: Sources) -> list[tuple[str, Source]]:
    """Return all sources, each with its name."""
    return [
        (name, each)
        for name, found in sources.items()
        for each in ([found] if isinstance(found, Source) else found)
    ]


def common_space(sources: Sequence[tuple[str, Source]]) -> LabelSpace:
    """Return the label space of sources that agree on their classes.

    Raises:
        InputError: two do not.
    """
    lists = [
        (f"{name} ({kind})", classes)
        for name, source in sources
        for kind, task, classes in (
            ("masks", "segmentation", source.mask_classes),
            ("boxes", "detection", source.box_classes),
        )
        if task in source.tasks
    ]
    name, classes = lists[0]
    for other, different in lists[1:]:
        if different.names != classes.names:
            raise InputError(
                f"{name} has {len(classes)} classes and {other} {len(different)}, not the same: "
                "expected a label space (space: voc, coco80 or a YAML file)"
            )
    return LabelSpace.of(classes)
