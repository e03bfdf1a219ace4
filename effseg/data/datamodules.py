"""Lightning data modules: VOC 2012, your own folder, and the built-in miniature."""

# B batch, H W pixels, K classes

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from effseg.data.folder import FolderSegmentation, load_classes
from effseg.data.loading import eval_loader, train_loader
from effseg.data.pairs import PairDataset
from effseg.data.samples import Classes, Sample
from effseg.data.shapes import ShapesSegmentation, default_folder, write_shapes
from effseg.data.transforms import Augmentation, train_transform
from effseg.data.voc import Split, VOCSegmentation


class SegmentationDataModule(LightningDataModule):
    """The loaders of training and evaluation over two data sets.

    Training batches hold crops: ``image`` (B, 3, H, W) uint8, ``mask`` (B, H, W) uint8 with 255
    where nothing is known. Evaluation batches hold lists of whole photos, none padded, none
    dropped. A subclass says which data sets (``make_train``, ``make_val``) and which ``classes``.

    Args:
        batch_size: crops a step and process.
        eval_batch_size: photos a step and process in evaluation.
        crop_size: side of the training crop in pixels, or (height, width).
        scale: range of the random scale, see :func:`effseg.data.transforms.train_transform`.
        flip: probability of a left-right flip.
        colour: strength of the colour change, 0 … 1.
        num_workers: processes that read a loader; None takes one a core, at most 8.
        seed: of order and augmentation; None takes the seed of ``seed_everything``.
    """

    def __init__(
        self,
        batch_size: int = 16,
        eval_batch_size: int = 8,
        crop_size: int | tuple[int, int] = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        colour: float = 0.2,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; files are first touched in ``setup``."""
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.crop_size = crop_size
        self.scale = scale
        self.flip = flip
        self.colour = colour
        self.num_workers = min(8, _cores()) if num_workers is None else num_workers
        self.seed = seed
        self.train_set: PairDataset | None = None
        self.val_set: PairDataset | None = None

    @property
    def classes(self) -> Classes:
        """The class list, background first."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """The number of classes K, background included."""
        return len(self.classes)

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training set with this transform."""
        raise NotImplementedError

    def make_val(self) -> PairDataset:
        """Return the evaluation set."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Find the files; both sets for ``fit``, else only the evaluation set.

        Raises:
            InputError: a data set cannot be used.
        """
        if self.val_set is None:
            self.val_set = self.make_val()
        if stage in ("fit", None) and self.train_set is None:
            transform = train_transform(self.crop_size, self.scale, self.flip, self.colour)
            self.train_set = self.make_train(transform)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the shuffled training loader.

        Raises:
            InputError: the training set is smaller than one batch.
        """
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        # The epoch goes in so that a resumed run does not see the first epochs' crops again.
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        seed = torch.initial_seed() if self.seed is None else self.seed
        return train_loader(
            self.train_set, self.batch_size, self.num_workers, seed % 2**32 + epoch * 2**32
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the evaluation loader: every photo once, at its own size."""
        if self.val_set is None:
            self.setup("validate")
        assert self.val_set is not None
        return eval_loader(self.val_set, self.eval_batch_size, self.num_workers)


class VOCDataModule(SegmentationDataModule):
    """Pascal VOC 2012.

    Args:
        root: see :func:`effseg.data.voc.find_voc`; None takes ``EFFSEG_DATA`` or ``./datasets``.
        train_split: ``train_aug`` (10,582 photos), ``train`` (1,464) or ``trainval``.
        val_split: ``val`` (1,449).
        kwargs: the settings of :class:`SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: Split = "train_aug",
        val_split: Split = "val",
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.root = root
        self.train_split = train_split
        self.val_split = val_split

    @property
    def classes(self) -> Classes:
        """VOC's 21 classes."""
        return Classes.from_card(VOCSegmentation.card)

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training split."""
        return VOCSegmentation(self.root, self.train_split, transform)

    def make_val(self) -> PairDataset:
        """Return the evaluation split."""
        return VOCSegmentation(self.root, self.val_split)


class FolderDataModule(SegmentationDataModule):
    """Your own data: ``images/{train,val}`` and ``masks/{train,val}``.

    Args:
        root: the folder that holds ``images`` and ``masks``.
        classes: names, background first, or a file of them
            (:func:`effseg.data.folder.load_classes`).
        train_split: sub-folder of the training photos.
        val_split: sub-folder of the evaluation photos.
        kwargs: the settings of :class:`SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | str,
        train_split: str = "train",
        val_split: str = "val",
        **kwargs: Any,
    ) -> None:
        """Read the class list."""
        super().__init__(**kwargs)
        self.root = root
        self.train_split = train_split
        self.val_split = val_split
        self._classes = load_classes(classes)

    @property
    def classes(self) -> Classes:
        """The class list, background first."""
        return self._classes

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training folder."""
        return FolderSegmentation(self.root, self._classes, self.train_split, transform)

    def make_val(self) -> PairDataset:
        """Return the evaluation folder."""
        return FolderSegmentation(self.root, self._classes, self.val_split)


class ShapesDataModule(SegmentationDataModule):
    """The built-in miniature, drawn on the first use.

    Args:
        root: folder to draw in; None takes :func:`effseg.data.shapes.default_folder`.
        train: number of training photos.
        val: number of evaluation photos.
        size: (H, W) of the photos in pixels.
        drawing_seed: of the photos; order and augmentation have ``seed``.
        crop_size: as in :class:`SegmentationDataModule`, smaller by default, as the photos are.
        scale: as in :class:`SegmentationDataModule`, with shapes that fit the crop by default.
        kwargs: its other settings.
    """

    def __init__(
        self,
        root: str | None = None,
        train: int = 400,
        val: int = 100,
        size: tuple[int, int] = (192, 256),
        drawing_seed: int = 0,
        crop_size: int | tuple[int, int] = 128,
        scale: tuple[float, float] = (0.6, 1.2),
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(crop_size=crop_size, scale=scale, **kwargs)
        self.root = default_folder() if root is None else Path(root)
        self.train_photos = train
        self.val_photos = val
        self.size = size
        self.drawing_seed = drawing_seed

    @property
    def classes(self) -> Classes:
        """Background and six shapes."""
        return Classes.from_card(ShapesSegmentation.card)

    def prepare_data(self) -> None:
        """Draw the photos unless they are there; Lightning calls this in one process only."""
        write_shapes(self.root, self.train_photos, self.val_photos, self.size, self.drawing_seed)

    def make_train(self, transform: Augmentation) -> PairDataset:
        """Return the training split."""
        return ShapesSegmentation(self.root, "train", transform)

    def make_val(self) -> PairDataset:
        """Return the evaluation split."""
        return ShapesSegmentation(self.root, "val")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # a container's share, not the machine's
    return os.cpu_count() or 1
