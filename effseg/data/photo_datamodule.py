"""The Lightning data module that all others are: two data sets and their loaders."""

# B batch, H W pixels, K classes

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from effseg.data.dataset import PhotoDataset
from effseg.data.loading import eval_loader, train_loader
from effseg.data.samples import Classes, Sample
from effseg.data.transforms import Augmentation, train_transform


class PhotoDataModule(LightningDataModule):
    """The loaders of training and evaluation over two data sets.

    Training batches hold crops of one size, ``image`` (B, 3, H, W) uint8. Evaluation batches hold
    lists of whole photos, none padded, none dropped. A subclass says which data sets
    (``make_train``, ``make_val``) and which ``classes``.

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

    scale_to_crop = False
    """What ``scale`` is relative to, see :func:`effseg.data.transforms.train_transform`."""

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
        self.train_set: PhotoDataset | None = None
        self.val_set: PhotoDataset | None = None
        self.start = (0, 0)

    @property
    def classes(self) -> Classes:
        """The class list, background first."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """The number of classes K that a model needs."""
        raise NotImplementedError

    def make_train(self, transform: Augmentation) -> PhotoDataset:
        """Return the training set with this transform."""
        raise NotImplementedError

    def make_val(self) -> PhotoDataset:
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
            transform = train_transform(
                self.crop_size, self.scale, self.flip, self.colour, self.scale_to_crop
            )
            self.train_set = self.make_train(transform)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the shuffled training loader.

        Raises:
            InputError: the training set is smaller than one batch.
        """
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        return train_loader(
            self.train_set, self.batch_size, self.num_workers, self._order_seed(), self.start
        )

    def _order_seed(self) -> int:
        return (torch.initial_seed() if self.seed is None else self.seed) % 2**32

    def state_dict(self) -> dict[str, Any]:
        """Keep the place in the stream of photos: (epoch, batch) of the next batch."""
        if self.trainer is None:
            return {}
        epoch = self.trainer.current_epoch
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batch >= self.trainer.num_training_batches:
            epoch, batch = epoch + 1, 0
        return {"start": (epoch, batch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; Lightning calls it before it asks for the loader."""
        epoch, batch = state_dict.get("start", (0, 0))
        self.start = (int(epoch), int(batch))

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the evaluation loader: every photo once, at its own size."""
        if self.val_set is None:
            self.setup("validate")
        assert self.val_set is not None
        return eval_loader(self.val_set, self.eval_batch_size, self.num_workers)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # a container's share, not the machine's
    return os.cpu_count() or 1
