"""Sources as one dataset: one label space, augmentation, samples with the same keys."""

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
    """One source in the dataset."""

    name: str
    number: int
    """Of the name: sources of a list share it."""
    source: Source
    map: LabelMap
    first: int
    """Number of its first image in the dataset."""


class Dataset(TorchDataset[Sample]):
    """The images of several sources, concatenated.

    Without augmentation an index gives the image as it is on disk; with augmentation an
    `effseg.data.sampling.Draw` gives a crop. All samples have the same keys, see
    `effseg.data.sample.Sample`: missing labels are filled in (a mask of 255, no boxes, no known
    class), `real` lists the tasks with actual labels.

    Args:
        sources: maps names to a source, or to a list of sources.
        space: the label space; None: the classes of the sources, which must agree.
        augment: makes crops, see `Augment`; None: whole images.
        background: see `effseg.data.classes.Background`.
        check_files: check now that all files exist.
        skip_unreadable: with augmentation, replace an image that cannot be read by the next one of
            its source and report it in the sample's `skipped`.

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

    def _locate(self, index: int) -> tuple[_Member, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        member = self.members[int(np.searchsorted(self._starts, index, side="right")) - 1]
        return member, index - member.first

    def read(self, index: int) -> Sample:
        """Read an image and the labels that it has, brought to the label space.

        Raises:
            InputError: as the source's `image` and `labels`.
        """
        member, number = self._locate(index)
        image = member.source.image(number)
        sample = Sample(id=member.source.ids[number], image=image)
        sample["source"], sample["number"] = member.name, member.number
        sample.update(self.labels(index, (image.shape[1], image.shape[2])))
        sample["real"] = tuple(
            task for task, key in zip(TASKS, ("mask", "boxes"), strict=True) if key in sample
        )
        return sample

    def labels(self, index: int, size: Size | None = None) -> Sample:
        """Read the labels that an image has, brought to the label space; see the source's."""
        member, number = self._locate(index)
        labels = member.source.labels(number, size)
        if "mask" in labels and not member.map.identity:
            labels["mask"] = torch.from_numpy(member.map.masks[labels["mask"].numpy()])
        if "boxes" in labels:
            labels["labels"] = member.map.boxes[labels["labels"]]
            labels["known"] = member.map.known
            keep_boxes(labels, labels["labels"] != UNMAPPED)
        return labels

    def size(self, index: int) -> Size:
        """Return (H, W) of an image without decoding it."""
        member, number = self._locate(index)
        return member.source.size(number)

    def annotated(self) -> dict[TaskName, npt.NDArray[np.bool_]]:
        """Return which classes (K,) any source annotates, for each task with labels."""
        annotated: dict[TaskName, npt.NDArray[np.bool_]] = {}
        for member in self.members:
            tasks = [task for task in TASKS if member.source.has(task).any()]
            for task in tasks:
                classes = annotated.setdefault(task, np.zeros(len(self.classes), np.bool_))
                if task == "segmentation":
                    values = member.map.masks[: len(member.source.mask_classes)]
                    classes[values[values != IGNORE_INDEX]] = True
                else:
                    classes[1:] |= member.map.known.numpy()
        return annotated

    def __getitem__(self, index: int | Draw) -> Sample:
        """Read an image; augment it, if the dataset does; fill in what it lacks.

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
        member, number = self._locate(index)
        count = len(member.source)
        skipped: list[str] = []
        for offset in range(min(count, _TRIES) if self.skip_unreadable else 1):
            try:
                return self.read(member.first + (number + offset) % count), skipped
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
        parts = []
        for number, name in enumerate(self.names):
            members = [member for member in self.members if member.number == number]
            images = {
                task: np.concatenate(
                    [member.first + np.flatnonzero(member.source.has(task)) for member in members]
                )
                for task in self.tasks
            }
            images = {task: numbers for task, numbers in images.items() if len(numbers)}
            parts.append(Part(images, given.get(name, 1.0), power))
        return parts

    def check_apart(self, other: "Dataset") -> None:
        """Check that another dataset holds none of the images of this one.

        An image is the same where its file is, links followed, or its id under one card.

        Args:
            other: the dataset of evaluation.

        Raises:
            InputError: shared images; the first is named, all are counted.
        """
        for member in self.members:
            files = dict(zip(_files(member.source), member.source.ids, strict=True))
            ids = set(member.source.ids)
            for other_member in other.members:
                pairs = zip(_files(other_member.source), other_member.source.ids, strict=True)
                cards = (
                    member.source.card is not None
                    and member.source.card == other_member.source.card
                )
                shared = [i for file, i in pairs if file in files or (cards and i in ids)]
                if shared:
                    raise InputError(
                        f"train.{member.name} and val.{other_member.name} share {len(shared)} of "
                        f"{len(other_member.source)} images, the first is {shared[0]} "
                        f"({member.source}; {other_member.source}); expected none, or "
                        "allow_overlap: true"
                    )


def _files(source: Source) -> list[object]:
    return [*resolve([source.image_path(index) for index in range(len(source))])]


def flatten(sources: Sources) -> list[tuple[str, Source]]:
    """Return all sources, each with its name."""
    return [
        (name, each)
        for name, entry in sources.items()
        for each in ([entry] if isinstance(entry, Source) else entry)
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
    for other_name, other_classes in lists[1:]:
        if other_classes.names != classes.names:
            raise InputError(
                f"{name} has {len(classes)} classes and {other_name} {len(other_classes)}, not the "
                "same: expected a label space (space: voc, coco80 or a YAML file)"
            )
    return LabelSpace.of(classes)
