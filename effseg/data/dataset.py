"""Sources as one dataset: one label space, augmentation, samples with the same keys."""

# H W pixels, N boxes, K classes of the space, background included

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset as TorchDataset

from effseg.data.classes import UNMAPPED, Background, Classes, LabelMap, LabelSpace
from effseg.data.listing import resolve
from effseg.data.sample import IGNORE_INDEX, TASK_KEYS, TASKS, Sample, TaskName, keep_boxes
from effseg.data.sampling import Draw, Part, Weights, parse_weights
from effseg.data.sources.source import Size, Source
from effseg.errors import InputError

Sources = Mapping[str, Source | Sequence[Source]]
Augment = Callable[[Sample, int], Sample]
"""A function from a sample and its position in the stream to a sample of the crop's size."""

_TRIES = 10  # images in a row that cannot be read: more are no accident


@dataclass(frozen=True)
class _Member:
    """One source in the dataset; sources of a list share the name."""

    name: str
    source: Source
    map: LabelMap
    first: int
    """Index of its first image in the dataset."""


class Dataset(TorchDataset[Sample]):
    """The images of several sources, concatenated.

    Without augmentation an index gives the whole image; with augmentation an
    `effseg.data.sampling.Draw` gives a crop. All samples have the same keys: missing labels are
    filled in (a mask of 255, no boxes, no known class), `real` lists the tasks with actual labels.

    Without a label space, the classes of the sources must agree. With augmentation,
    `skip_unreadable` replaces an image that cannot be read by the next one of its source with
    labels for the step, and reports it in the sample's `skipped`.
    """

    def __init__(
        self,
        sources: Sources,
        space: LabelSpace | None = None,
        augment: Augment | None = None,
        background: Background = "ignore",
        skip_unreadable: bool = False,
    ) -> None:
        listed = flatten(sources)
        if not listed:
            raise InputError("no source of images, expected at least one")
        self.names = tuple(sources)
        self.space = common_space(listed) if space is None else space
        self.augment, self.skip_unreadable = augment, skip_unreadable
        self.members: list[_Member] = []
        self.length = 0
        for name, source in listed:
            source.verify()
            source.settle()  # before each worker does
            classes = source.mask_classes, source.box_classes
            label_map = self.space.map(*classes, f"{name}: {source}", background)
            self.members.append(_Member(name, source, label_map, self.length))
            self.length += len(source)
        if not self.length:
            raise InputError(f"{', '.join(self.names)}: no images, expected at least one")

    @property
    def classes(self) -> Classes:
        """The classes of the label space, background first."""
        return self.space.classes

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that any source has labels for."""
        return tuple(t for t in TASKS if any(t in m.source.tasks for m in self.members))

    def __len__(self) -> int:
        """Return the number of images."""
        return self.length

    def _locate(self, index: int) -> tuple[_Member, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        place = bisect_right(self.members, index, key=lambda member: member.first) - 1
        return self.members[place], index - self.members[place].first

    def read(self, index: int) -> Sample:
        """Read an image and its labels, mapped to the label space; raises as the source."""
        member, number = self._locate(index)
        image = member.source.image(number)
        sample = self.labels(index, (image.shape[1], image.shape[2]))
        sample["real"] = tuple(task for task in TASKS if TASK_KEYS[task] in sample)
        sample["id"], sample["image"] = member.source.ids[number], image
        sample["source"], sample["number"] = member.name, self.names.index(member.name)
        return sample

    def labels(self, index: int, size: Size | None = None) -> Sample:
        """Read the labels of an image, mapped to the label space; see `Source.labels`."""
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
            for task in (task for task in TASKS if member.source.has(task).any()):
                classes = annotated.setdefault(task, np.zeros(len(self.classes), np.bool_))
                if task == "segmentation":
                    values = member.map.masks[: len(member.source.mask_classes)]
                    classes[values[values != IGNORE_INDEX]] = True
                else:
                    classes[1:] |= member.map.known.numpy()
        return annotated

    def __getitem__(self, index: int | Draw) -> Sample:
        """Read an image, augment it if the dataset does, and fill in missing labels."""
        draw = index if isinstance(index, Draw) else Draw(index, index)
        if self.augment is None:
            sample = self._filled(self.read(draw.image))
            if "boxes" in sample:
                sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
                sample.setdefault("area", sides.prod(1))
            return sample
        skipped: list[str] = []
        tasks = draw.tasks or self.tasks
        read = self._read_or_next(draw.image, tasks, skipped)
        sample = self._filled(self.augment(read, draw.position))
        if self.skip_unreadable:
            sample["skipped"] = skipped
        sample["tasks"], sample["freeze"] = tasks, draw.freeze
        for key in ("difficult", "area", "source"):  # no loss needs them
            sample.pop(key, None)  # type: ignore[misc]
        return sample

    def _read_or_next(self, index: int, tasks: Sequence[TaskName], skipped: list[str]) -> Sample:
        """Read an image, or the next of its source that can be read; add errors to `skipped`."""
        if not self.skip_unreadable:
            return self.read(index)
        for each in islice(self._and_next(index, tasks), _TRIES):
            try:
                return self.read(each)
            except (InputError, OSError) as error:
                skipped.append(str(error))
        count = len(skipped) - 1
        raise InputError(f"{skipped[0]}; and {count} images after it are unreadable too")

    def _and_next(self, index: int, tasks: Sequence[TaskName]) -> Iterator[int]:
        """Yield an index, then those after it in its source with labels for one of the tasks."""
        yield index  # listing the others takes long
        member, number = self._locate(index)
        labelled = np.logical_or.reduce([member.source.has(task) for task in tasks])
        labelled[number] = False
        others = np.flatnonzero(labelled)
        others = np.roll(others, -int(np.searchsorted(others, number)))
        yield from (member.first + others).tolist()

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

    def count(self, heads: Sequence[TaskName]) -> int:
        """Return the number of images with labels for a network's heads."""
        return sum(len(part.serving(heads)) for part in self.parts("images", heads))

    def parts(self, weights: Weights, heads: Sequence[TaskName] = TASKS) -> list[Part]:
        """Return a part per name, for a network's heads; raises as `sampling.parse_weights`."""
        weight_of, power = parse_weights(weights, self.names)
        parts = {name: Part({}, weight_of[name], power) for name in self.names}
        for task in (task for task in self.tasks if task in heads):
            for name, part in parts.items():
                members = [member for member in self.members if member.name == name]
                images = [m.first + np.flatnonzero(m.source.has(task)) for m in members]
                if any(len(each) for each in images):
                    part.images[task] = np.concatenate(images)
        return list(parts.values())

    def check_apart(self, other: "Dataset") -> None:
        """Raise InputError if a dataset of evaluation has images of this one.

        Two images are the same if they are the same file (links resolved), or have the same id and
        their sources the same card.
        """
        for member in self.members:
            train = member.source
            train_keys = set(chain.from_iterable(_identities(train)))
            for other_member in other.members:
                val = other_member.source
                pairs = zip(val.ids, _identities(val), strict=True)
                shared = [name for name, keys in pairs if not train_keys.isdisjoint(keys)]
                if shared:
                    raise InputError(
                        f"train.{member.name} and val.{other_member.name} share {len(shared)} of "
                        f"{len(val)} images, the first is {shared[0]} ({train}; {val}); expected "
                        "none, or allow_overlap: true"
                    )


def _identities(source: Source) -> list[list[object]]:
    """Return what identifies each image: its file, and its id if the source has a card."""
    files = resolve([source.image_path(index) for index in range(len(source))])
    card = source.card
    pairs = zip(files, source.ids, strict=True)
    return [[file] if card is None else [file, (card, name)] for file, name in pairs]


def flatten(sources: Sources) -> list[tuple[str, Source]]:
    """Return all sources, each with its name; InputError: anything else, as one without a name."""
    named: Any = sources.items() if isinstance(sources, Mapping) else [("", sources)]
    listed = [
        (name, each)
        for name, entry in named
        for each in (entry if isinstance(entry, list | tuple) else [entry])
    ]
    for name, each in listed:
        if not (name and isinstance(each, Source)):
            raise InputError(f"{each!r:.60}: expected a source by its name, as {{'voc': VOC()}}")
    return listed


def class_lists(source: Source) -> dict[TaskName, Classes]:
    """Return the class list of each task that a source has labels for."""
    return {
        task: source.mask_classes if task == "segmentation" else source.box_classes
        for task in source.tasks
    }


def common_space(sources: Sequence[tuple[str, Source]]) -> LabelSpace:
    """Return the label space of sources that agree on their classes; InputError if two do not."""
    kinds: dict[TaskName, str] = {"segmentation": "masks", "detection": "boxes"}
    lists = [
        (f"{name} ({kinds[task]})", classes)
        for name, source in sources
        for task, classes in class_lists(source).items()
    ]
    first, classes = lists[0]
    for other, other_classes in lists[1:]:
        if other_classes.names != classes.names:
            raise InputError(
                f"{first} has {len(classes)} classes and {other} {len(other_classes)}, not the "
                "same: expected a label space (space: voc, coco80 or a YAML file)"
            )
    return LabelSpace.of(classes)
