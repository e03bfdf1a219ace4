"""Lightning data modules of joint training: several data sets, or the miniature."""

# B batch, H W pixels, K classes of the label space

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from effseg.data.boxes import VOCDetection
from effseg.data.dataset import PhotoDataset
from effseg.data.joined import Joined, Mapped
from effseg.data.label_space import Background, LabelSpace
from effseg.data.loading import train_loader
from effseg.data.mixture import Mixture, Weights
from effseg.data.photo_datamodule import PhotoDataModule
from effseg.data.samples import Classes, Sample
from effseg.data.schedule import Schedule
from effseg.data.shapes import ShapesPhotos, ShapesSegmentation
from effseg.data.transforms import Augmentation
from effseg.errors import InputError

DatasetAt = Callable[[str | None], PhotoDataset]
"""A data set whose root is still to be given: in a recipe a class and its other arguments."""


@dataclass
class MixturePart:
    """One part of a mixture.

    Attributes:
        train: data sets over the same photos, which give them different labels.
        val: the same for evaluation; none: the part is trained on only.
    """

    train: list[DatasetAt] = field(default_factory=list)
    val: list[DatasetAt] = field(default_factory=list)


class MixtureDataModule(PhotoDataModule):
    """Several data sets in fixed proportions, brought to one label space.

    Training batches carry all labels, real or empty, with ``has_mask``, ``has_boxes`` (B,),
    ``known`` (B, K-1) and ``source`` (B,), see :class:`effseg.data.mixture.Mixture`. The scale is
    relative to that at which the whole photo just fits the crop.

    Args:
        parts: name to data sets.
        space: ``voc``, ``coco80``, the name of a data set's card, or a YAML file, see
            :meth:`effseg.data.label_space.LabelSpace.load`.
        weights: how often a part is drawn: ``photos``, ``equal``, a temperature, or a weight for
            each, see :data:`effseg.data.mixture.Weights`.
        background: what the background of a data set means that lacks some classes of the space,
            see :data:`effseg.data.label_space.Background`.
        root: folder of all data sets; None takes ``EFFSEG_DATA`` or ``./datasets``.
        steps: batches an epoch; None: as many as there are photos for.
        kwargs: the settings of :class:`PhotoDataModule`.
    """

    scale_to_crop = True

    def __init__(
        self,
        parts: dict[str, MixturePart],
        space: str = "voc",
        weights: Weights = "photos",
        background: Background = "ignore",
        root: str | None = None,
        steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the settings and read the label space."""
        super().__init__(**kwargs)
        if steps is not None and steps < 1:
            raise InputError(f"steps={steps}: expected at least 1, or null")
        for name in parts:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise InputError(f"part {name!r}: expected a name of letters, digits, _ and -")
        self.parts = parts
        self.space = LabelSpace.load(space)
        self.weights = weights
        self.background = background
        self.root = root
        self.steps = steps
        self.schedule = Schedule()

    @property
    def classes(self) -> Classes:
        """The label space's classes, background first."""
        return self.space.classes

    @property
    def num_classes(self) -> int:
        """The number of mask classes K, background included; there is one box class less."""
        return len(self.classes)

    def follow(self, schedule: Schedule) -> None:
        """Draw photos for the tasks of a schedule; before the loader is made."""
        self.schedule = schedule

    def setup(self, stage: str | None = None) -> None:
        """Find the files.

        Raises:
            InputError: a data set cannot be used, a class of the user's space does not exist, or a
                weight is wrong.
        """
        super().setup(stage)
        sets = [s for s in (self.train_set, self.val_set) if isinstance(s, Mixture)]
        joined = [part for mixture in sets for part in mixture.parts.values()]
        mapped = [d for part in joined for d in part.datasets if isinstance(d, Mapped)]
        self.space.check_used([d.dataset.classes for d in mapped])
        if isinstance(self.train_set, Mixture):
            self.train_set.stream(self.weights)

    def make_train(self, transform: Augmentation) -> Mixture:
        """Return the training mixture."""
        return Mixture(self._join("train"), transform)

    def make_val(self) -> Mixture:
        """Return all parts that are evaluated."""
        return Mixture(self._join("val"))

    def _join(self, split: str) -> dict[str, Joined]:
        listed: dict[str, Sequence[DatasetAt]] = {
            name: getattr(part, split) for name, part in self.parts.items()
        }
        return {
            name: Joined([Mapped(make(self.root), self.space, self.background) for make in found])
            for name, found in listed.items()
            if found
        }

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the training loader: the mixture in every batch.

        Raises:
            InputError: the mixture is smaller than one batch, or has no label for a task of the
                schedule.
        """
        if self.train_set is None:
            self.setup("fit")
        assert isinstance(self.train_set, Mixture)
        return train_loader(
            self.train_set,
            self.batch_size,
            self.num_workers,
            self._order_seed(),
            self.start,
            self.train_set.stream(self.weights),
            self.schedule,
            self.steps,
        )


class ShapesMixtureDataModule(MixtureDataModule):
    """Masks on some photos of the built-in miniature, boxes on others.

    Args:
        root: folder to draw in; None takes :func:`effseg.data.shapes.default_folder`.
        train: number of training photos; the first half has masks, the second half boxes.
        val: number of evaluation photos, which have both.
        size: (H, W) of the photos in pixels.
        drawing_seed: of the photos; order and augmentation have ``seed``.
        crop_size: as in :class:`PhotoDataModule`.
        scale: as in :class:`MixtureDataModule`.
        kwargs: its other settings.
    """

    def __init__(
        self,
        root: str | None = None,
        train: int = 800,
        val: int = 100,
        size: tuple[int, int] = (192, 256),
        drawing_seed: int = 0,
        crop_size: int | tuple[int, int] = 192,
        scale: tuple[float, float] = (0.8, 1.6),
        **kwargs: Any,
    ) -> None:
        """Describe the two halves."""
        self.photos = ShapesPhotos.at(root, train, val, size, drawing_seed)
        half = train // 2

        def masks(split: str, first: int | None = None, last: int | None = None) -> DatasetAt:
            return lambda root: Subset(ShapesSegmentation(root, split), first, last)  # type: ignore[arg-type]

        def boxes(split: str, first: int | None = None, last: int | None = None) -> DatasetAt:
            card = ShapesSegmentation.card
            return lambda root: Subset(VOCDetection(root, split, card=card), first, last)  # type: ignore[arg-type]

        parts = {
            "masks": MixturePart([masks("train", last=half)]),
            "boxes": MixturePart([boxes("train", first=half)]),
            "both": MixturePart(val=[masks("val"), boxes("val")]),
        }
        super().__init__(
            parts,
            space="shapes",
            root=str(self.photos.root),
            crop_size=crop_size,
            scale=scale,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Draw the photos unless they are there; Lightning calls this in one process only."""
        self.photos.write()


class Subset(PhotoDataset):
    """Photos ``first`` to ``last`` (not included) of a data set."""

    def __init__(self, dataset: PhotoDataset, first: int | None, last: int | None) -> None:
        """Choose the photos."""
        super().__init__(dataset.classes, None, Path(dataset.source))
        self.dataset = dataset
        self.range = range(*slice(first, last).indices(len(dataset)))
        self.tasks = dataset.tasks

    @property
    def ids(self) -> Sequence[str]:
        """The ids of the photos."""
        ids = self.dataset.ids
        return [ids[i] for i in self.range]

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self.range)

    def read(self, index: int) -> Sample:
        """Read a sample; raises as the data set."""
        return self.dataset.read(self.range[index])
