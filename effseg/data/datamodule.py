"""The data module: training and evaluation batches from sources."""

# B batch, H W pixels, K classes of the label space

import os
import re
import signal
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from effseg.data.classes import Background, Classes, LabelSpace
from effseg.data.counts import balanced_weights, check_labels, evaluation_batch, require_counted
from effseg.data.dataset import Dataset, class_lists, common_space, flatten
from effseg.data.sample import TASKS, Batch, Sample, TaskName, collate_eval, collate_train
from effseg.data.sampling import Schedule, Stage, StreamSampler, Weights, parse_weights
from effseg.data.sources.source import Source, check_choices
from effseg.distributed import of_all_processes, rank_and_world
from effseg.errors import InputError, needs

with needs("train"):
    from lightning.pytorch import LightningDataModule

    # Not in Lightning's documented API; torch's DistributedSampler would repeat images.
    from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler

NamedSources = dict[str, Source | list[Source]]


class ImageDataModule(LightningDataModule):
    """Training and evaluation sources in one label space.

    Training batches contain crops of one size, evaluation batches whole images at native size; see
    `effseg.data.sample.Batch`. A training batch names the heads to run (`tasks`) and what is
    frozen (`freeze`), as its stage defines.

    A training sample depends only on the seed and its position in the stream, not on the number of
    workers or on resuming.

    Args:
        train: maps names to a source, or to a list of sources that are drawn as one.
        val: the same for evaluation.
        root: default folder of the sources; None: `EFFSEG_DATA` or `./datasets`.
        classes: default class list of the sources, see `effseg.data.classes.load_classes`.
        space: see `effseg.data.classes.LabelSpace.load`; None: the classes of the sources,
            which must agree.
        background: see `effseg.data.classes.Background`.
        weights: how often a source is drawn, see `effseg.data.sampling.Weights`.
        stages: the stages of training; None: one stage with all tasks that have labels.
        crop_size: side of the training crop in pixels, or (height, width).
        scale: range of the random scale.
        scale_relative_to: `image`: a scale of 1 is the native size; `crop`: it is the size at
            which the whole image just fits the crop, as in detection.
        max_side: with `scale_relative_to: image`, a scale of 1 is at most this longer side in
            pixels, like evaluation's protocol `maxN`.
        flip: probability of a left-right flip.
        colour: strength of the colour change, 0 … 1.
        augment: further albumentations transforms, each `{class_path, init_args}`, that keep the
            size; applied last.
        batch_size: crops per step and process.
        eval_batch_size: images per step and process in evaluation; fewer if they are large, so
            that a batch has at most 8 megapixels.
        num_workers: worker processes per loader; None: one per core, at most 8.
        steps: batches per epoch; None: one pass over the images.
        allow_overlap: allow images in both `train` and `val`.
        unreadable: whether a training image that cannot be read during a run is an `error`, or is
            replaced by the next one of its source (`skip`); evaluation skips no image.
        unreadable_limit: maximum number of images to skip, per process and start.
        seed: seed of order and augmentation; None: the seed of `seed_everything`.

    Raises:
        InputError: a setting out of range; in `setup`: a source cannot be used, sources and space
            do not match, or train and val share images.
    """

    def __init__(
        self,
        train: NamedSources | None = None,
        val: NamedSources | None = None,
        root: str | None = None,
        classes: list[str] | str | None = None,
        space: str | None = None,
        background: Background = "ignore",
        weights: Weights = "images",
        stages: list[Stage] | None = None,
        crop_size: int | tuple[int, int] = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        scale_relative_to: Literal["image", "crop"] = "image",
        max_side: int | None = None,
        flip: float = 0.5,
        colour: float = 0.2,
        augment: list[dict[str, Any]] | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 8,
        num_workers: int | None = None,
        steps: int | None = None,
        allow_overlap: bool = False,
        unreadable: Literal["error", "skip"] = "error",
        unreadable_limit: int = 10,
        seed: int | None = None,
    ) -> None:
        """Keep the settings and complete the sources; files are first read in `setup`."""
        super().__init__()
        for given in (train, val):
            flatten({} if given is None else given)  # refuses anything else
        self.train, self.val = dict(train or {}), dict(val or {})
        self.schedule = Schedule() if stages is None else Schedule(tuple(stages))
        self.weights, self.background, self.steps = weights, background, steps
        self.crop_size, self.augment = crop_size, list(augment or ())
        self._augmentation: dict[str, Any] = {
            "scale": scale,
            "scale_relative_to": scale_relative_to,
            "max_side": max_side,
            "flip": flip,
            "colour": colour,
        }
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers = min(8, available_cores()) if num_workers is None else num_workers
        self.allow_overlap, self.seed = allow_overlap, seed
        self.unreadable, self.unreadable_limit, self.skipped = unreadable, unreadable_limit, 0
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None
        self.start = (0, 0)
        self.heads: tuple[TaskName, ...] = TASKS
        self._steps = 0
        self._space = space
        self._check()
        for _, source in self.sources():
            source.complete(root, classes)

    def _check(self) -> None:
        if not self.train and not self.val:
            raise InputError("data: no source in train and none in val, expected at least one")
        for name in (*self.train, *self.val):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise InputError(f"source {name!r}: expected a name of letters, digits, _ and -")
        check_choices(background=(self.background, Background))
        check_choices(unreadable=(self.unreadable, Literal["error", "skip"]))
        limits = {"batch_size": 1, "eval_batch_size": 1, "steps": 1, "num_workers": 0}
        for key, low in (limits | {"unreadable_limit": 0}).items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise InputError(f"{key}={value}: expected at least {low}")
        if self.train:
            parse_weights(self.weights, list(self.train))

    def sources(self) -> list[tuple[str, Source]]:
        """Return all sources, each with where it is used: `train.NAME` or `val.NAME`."""
        both = (("train", self.train), ("val", self.val))
        return [(f"{key}.{name}", s) for key, sources in both for name, s in flatten(sources)]

    @cached_property
    def space(self) -> LabelSpace:
        """The label space; raises as the class."""
        if self._space is None:
            return common_space(self.sources())
        space = LabelSpace.load(self._space)
        if space.strict:
            lists = [class_lists(source).values() for _, source in self.sources()]
            space.check_used([classes for each in lists for classes in each])
        return space

    @property
    def classes(self) -> Classes:
        """The classes of the label space, background first."""
        return self.space.classes

    @property
    def num_classes(self) -> int:
        """The number of mask classes K, background included; there is one box class less."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, background first."""
        return list(self.classes.names)

    @property
    def palette(self) -> list[list[int]]:
        """(R, G, B) of each class, 0 … 255."""
        return [list(colour) for colour in self.classes.palette]

    @property
    def train_sources(self) -> list[str]:
        """The names of the training sources, in the order of the batches' numbers."""
        return list(self.train)

    @property
    def val_sources(self) -> dict[str, dict[str, list[Any]]]:
        """The `tasks`, the `classes` of the label space and the `categories` of each source.

        Categories are the format's numbers of the box classes, in the order of the space, 0 for a
        class without one; empty if the format has no numbers.
        """
        described: dict[str, dict[str, list[Any]]] = {}
        for name, source in flatten(self.val):
            entry = described.setdefault(name, {"tasks": [], "classes": [], "categories": []})
            lists = class_lists(source)
            entry["tasks"] += [task for task in lists if task not in entry["tasks"]]
            annotated = {*entry["classes"]}.union(*map(self.space.annotated, lists.values()))
            entry["classes"] = [c for c in self.classes.names[1:] if c in annotated]
            if source.categories:
                labels = self.space.map(source.mask_classes, source.box_classes, name).boxes
                number = {int(labels[label]): c for label, c in source.categories.items()}
                entry["categories"] = [number.get(i, 0) for i in range(self.num_classes - 1)]
        return described

    def prepare_data(self) -> None:
        """Draw or download missing data; Lightning calls this in one process per machine."""
        for _, source in self.sources():
            source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Find the files: of both sets for `fit`, else of the evaluation set."""
        trained = [source for _, source in flatten(self.train)]
        if self.val_set is None and self.val:
            for _, source in flatten(self.val):
                source.settle(trained)
            self.val_set = Dataset(self.val, self.space, background=self.background)
            require_counted(self.val_set)
        if stage in ("fit", None) and self.train_set is None and self.train:
            from effseg.data.augment import Augmentation  # slow to load, and only training needs it

            settings = self._augmentation | {"extra": self.augment, "seed": self._stream_seed}
            augment, skip = Augmentation(self.crop_size, **settings), self.unreadable == "skip"
            train_set = Dataset(self.train, self.space, augment, self.background, skip)
            if self.val_set is not None and not self.allow_overlap:
                train_set.check_apart(self.val_set)
            check_labels(train_set)
            self.train_set = train_set

    def serve(self, model: str, heads: Sequence[TaskName]) -> None:
        """Draw only images that a network with these heads learns from; `TrainingTask` calls this.

        Raises:
            InputError: a stage, or all training data, are for a head that the network lacks.
        """
        for stage in self.schedule.stages:
            missing = [task for task in stage.tasks or () if task not in heads]
            if missing:
                raise InputError(
                    f"a stage with tasks {', '.join(stage.tasks or ())}: {model} has no head for "
                    f"{', '.join(missing)}, expected {', '.join(heads)} in data.stages"
                )
        labelled = self._set_up_for_training().tasks
        if not set(labelled) & set(heads):
            raise InputError(
                f"data.train: labels for {', '.join(labelled)}: {model} has no head for them, "
                f"expected labels for {' or '.join(heads)}"
            )
        self.heads = tuple(heads)

    def _set_up_for_training(self) -> Dataset:
        if self.train_set is None:
            self.setup("fit")
        if self.train_set is None:
            raise InputError("data.train: no source, expected at least one")
        return self.train_set

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of training: full batches, the same number in all processes.

        Without a seed every process has to call this, to take that of the first one.

        Raises:
            InputError: fewer images per process than a batch, or no label for a task of a stage.
        """
        train_set = self._set_up_for_training()
        if self.seed is None:  # with seeds of their own, processes would draw each other's images
            self._stream_seed = of_all_processes([self._stream_seed])[0]
        train_set.augment.seed = self._stream_seed  # type: ignore[union-attr]
        rank, world = rank_and_world()
        share = train_set.count(self.heads) // world
        if self.steps is None and share < self.batch_size:
            raise InputError(
                f"batch_size {self.batch_size}: only {share} training images a process, "
                "expected at least one full batch"
            )
        # BatchNorm fails on one image where a pyramid level is 1x1: no last, smaller batch.
        steps = self.steps or share // self.batch_size
        if self._steps not in (0, steps) and self.start[1]:
            self.start = (self.start[0] + 1, 0)  # of epochs of another length
        self._steps = steps
        sampler = StreamSampler(
            train_set.parts(self.weights, self.heads),
            self.schedule,
            steps=steps,
            batch_size=self.batch_size,
            seed=self._stream_seed,
            process=(rank, world),
            start=self.start,
        )
        return self._loader(train_set, self.batch_size, sampler, collate_train)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Return the loader of evaluation: every image once, in order, at its own size.

        Several processes read disjoint shares. Raises InputError: fewer images than processes.
        """
        if not self.val:
            return []
        if self.val_set is None:
            self.setup("validate")
        assert self.val_set is not None
        rank, world = rank_and_world()
        if len(self.val_set) < world:
            # A process without a batch would miss the collective calls of the others.
            raise InputError(f"{len(self.val_set)} evaluation images for {world} processes")
        sampler = UnrepeatedDistributedSampler(self.val_set, world, rank, shuffle=False)
        batch_size = evaluation_batch(self.val_set, self.eval_batch_size)
        return self._loader(self.val_set, batch_size, sampler, collate_eval)

    def class_weights(self) -> list[float]:
        """Return a weight per class, see `effseg.data.counts.balanced_weights`."""
        return balanced_weights(self._set_up_for_training())

    def _loader(
        self, dataset: Dataset, batch_size: int, sampler: Any, collate: Any
    ) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=_start_worker,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Print which images were skipped; raises InputError if they are more than the limit."""
        for reason in batch.get("skipped", []):
            self.skipped += 1
            limit = self.unreadable_limit
            if self.skipped > limit:
                raise InputError(
                    f"{reason}; data.unreadable_limit: {limit} images were skipped already"
                )
            print(f"warning: skipped: {reason} ({self.skipped} of at most {limit})", flush=True)
        return batch

    @cached_property
    def _stream_seed(self) -> int:
        # Torch's at the first use: training seeds it anew in every step.
        return (torch.initial_seed() if self.seed is None else self.seed) % 2**32

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the position in the stream: (epoch, batch) of the next batch."""
        if self.trainer is None:
            return {}
        epoch = self.trainer.current_epoch
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batch >= self.trainer.num_training_batches:
            epoch, batch = epoch + 1, 0
        return {"start": (epoch, batch), "steps": self._steps, "seed": self._stream_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from that position; Lightning calls this before it asks for the loader."""
        epoch, batch = state_dict.get("start", (0, 0))
        self.start, self._steps = (int(epoch), int(batch)), int(state_dict.get("steps", 0))
        if self.seed is None and "seed" in state_dict:
            self._stream_seed = int(state_dict["seed"])


def _start_worker(number: int) -> None:
    import cv2  # only workers need it here

    cv2.setNumThreads(0)  # the workers use all cores already
    # The trainer handles signals to all processes of a job and needs its workers until it has
    # saved; a worker that it does not end then ends half a minute later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30) and None)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # a container's share, not the machine's
    return os.cpu_count() or 1
