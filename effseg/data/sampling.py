"""The training stream: which image is drawn when, as a function of position and seed only."""

# A draw is an image of one process; draws come in the order of its batches.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import DistributedSampler

from effseg.data.sample import TASKS, TaskName
from effseg.errors import InputError

Indices = npt.NDArray[np.int64]
Weights = Literal["images", "equal"] | float | dict[str, float]
"""How often a source is drawn: by its number of images n, equally often, by n^(1/T) with a
temperature T (1 is `images`, large values approach `equal`), or by given weights."""


class Draw(NamedTuple):
    """A request for one training sample."""

    image: int
    """Index in the dataset."""
    position: int
    """Position in the stream of all processes, which seeds the augmentation."""
    tasks: tuple[TaskName, ...] = ()
    """The heads that run in the step; empty: all that have labels."""
    freeze: bool | int = False
    """What is frozen in the step."""


@dataclass(frozen=True)
class Stage:
    """A number of epochs with one set of tasks.

    Attributes:
        tasks: `segmentation`, `detection` or both; None: those that have labels.
        epochs: number of epochs; None: all remaining ones, in the last stage only.
        alternate: train one task per step in rotation, not all tasks in every step.
        freeze_encoder: freeze the encoder's weights and BatchNorm statistics; an integer n: only
            the layers that its maps up to level n (stride 2^n) depend on.
    """

    tasks: list[TaskName] | None = None
    epochs: int | None = None
    alternate: bool = False
    freeze_encoder: bool | int = False

    def __post_init__(self) -> None:
        """Refuse a stage that trains nothing."""
        tasks = self.tasks
        if tasks is not None and (not tasks or len(set(tasks) & set(TASKS)) < len(tasks)):
            raise InputError(f"stage with tasks {tasks}: expected some of {', '.join(TASKS)}")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"stage with epochs={self.epochs}: expected at least 1, or null")

    def task_cycle(self, tasks: Sequence[TaskName]) -> list[tuple[TaskName, ...]]:
        """Return the tasks of successive steps, to be repeated: all at once, or one by one.

        Args:
            tasks: the tasks that have labels.
        """
        chosen = tuple(tasks) if self.tasks is None else tuple(self.tasks)
        return [(task,) for task in chosen] if self.alternate else [chosen]


@dataclass(frozen=True)
class Schedule:
    """A sequence of stages; by default one, with all tasks in every step."""

    stages: tuple[Stage, ...] = (Stage(),)

    def __post_init__(self) -> None:
        """Refuse an empty list, and a stage without a number of epochs before the last."""
        if not self.stages:
            raise InputError("stages: an empty list, expected at least one stage")
        for number, stage in enumerate(self.stages[:-1], start=1):
            if stage.epochs is None:
                raise InputError(f"stage {number} of {len(self.stages)}: expected epochs")

    def check_epochs(self, epochs: int | None) -> None:
        """Refuse stages that take more epochs than there are; None or -1: no limit (InputError)."""
        taken = [stage.epochs or 1 for stage in self.stages]
        if epochs is not None and 0 <= epochs < sum(taken):
            reached = self.locate(epochs - 1)[0] + 1 if epochs else 0
            raise InputError(
                f"stages: {' + '.join(map(str, taken))} epochs or more, but max_epochs={epochs} "
                f"ends in stage {reached}; expected max_epochs of {sum(taken)} or more"
            )

    def locate(self, epoch: int) -> tuple[int, int]:
        """Return the number of an epoch's stage, and the epoch's within it; the last goes on."""
        for number, stage in enumerate(self.stages[:-1]):
            assert stage.epochs is not None
            if epoch < stage.epochs:
                return number, epoch
            epoch -= stage.epochs
        return len(self.stages) - 1, epoch


@dataclass(frozen=True)
class Part:
    """One source of a stream: its images by task, and how often it is drawn."""

    images: dict[TaskName, Indices]
    """Numbers in the dataset, by task; an image may serve several."""
    weight: float = 1.0
    power: float = 1.0
    """Its share of the draws is as weight × n^power, with its n images for the step's tasks."""

    def serving(self, tasks: Sequence[TaskName]) -> Indices:
        """Return the images that have a label for one of the tasks."""
        images = [self.images[task] for task in tasks if task in self.images]
        return np.unique(np.concatenate(images)) if images else np.empty(0, np.int64)


class StreamSampler(DistributedSampler[Any]):
    """Draws images from parts in fixed proportions; each part is reshuffled after every pass.

    Every batch has these proportions to within one image per part, in every process; processes draw
    different images. Draws depend on position and seed only: a run that starts at (epoch, batch)
    continues exactly as an uninterrupted one.

    It is a `DistributedSampler` only so that Lightning keeps it and calls `set_epoch`.

    Args:
        parts: the sources.
        schedule: the tasks of each step; parts without their labels are not drawn.
        steps: batches per epoch.
        batch_size: images per batch and process.
        seed: seed of the shuffling.
        process: (rank, number of processes).
        start: (epoch, batch) of the first draw.

    Raises:
        InputError: no part, no image, or no positive weight for some step.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        schedule: Schedule,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
        start: tuple[int, int] = (0, 0),
    ) -> None:
        """Lay out one epoch of every stage."""
        if any(part.weight < 0 or not np.isfinite(part.weight) for part in parts):
            weights = [part.weight for part in parts]
            raise InputError(f"weights {weights}: expected finite numbers, none negative")
        self.parts, self.schedule = list(parts), schedule
        tasks = [task for task in TASKS if any(task in part.images for part in parts)]
        self.task_cycles = [stage.task_cycle(tasks) for stage in schedule.stages]
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.rank, self.world = process
        self.start = start
        self.epoch = start[0]
        # A pool is a set of tasks: its parts are shuffled and counted on their own.
        self.pools = sorted(
            {tasks_of_step for cycle in self.task_cycles for tasks_of_step in cycle}
        )
        self.images = [[part.serving(pool) for part in self.parts] for pool in self.pools]
        self.shares = [
            self._share(pool, images) for pool, images in zip(self.pools, self.images, strict=True)
        ]
        self.layouts = [self._layout(number) for number in range(len(schedule.stages))]

    def _share(self, pool: tuple[TaskName, ...], images: list[Indices]) -> npt.NDArray[np.float64]:
        weights = np.array(
            [
                part.weight * len(candidates) ** part.power if len(candidates) else 0.0
                for part, candidates in zip(self.parts, images, strict=True)
            ]
        )
        for task in pool:
            positive = [p for p, w in zip(self.parts, weights, strict=True) if w > 0]
            if not any(len(part.images.get(task, ())) for part in positive):
                raise InputError(
                    f"no image to draw for {task}: expected a dataset with such labels and a "
                    "weight above 0"
                )
        share: npt.NDArray[np.float64] = weights / weights.sum()
        return share

    def _layout(self, stage: int) -> tuple[Indices, Indices, Indices]:
        """Return pool and part of every draw of an epoch, and the draws of each (pool, part)."""
        cycle = self.task_cycles[stage]
        pool = np.array([self.pools.index(cycle[s % len(cycle)]) for s in range(self.steps)])
        pool = pool.repeat(self.batch_size)
        part = np.empty(len(pool), np.int64)
        for number, share in enumerate(self.shares):
            positions = np.flatnonzero(pool == number)
            part[positions] = spread(share, len(positions))
        counts = np.zeros((len(self.pools), len(self.parts)), np.int64)
        np.add.at(counts, (pool, part), 1)
        return pool, part, counts

    def indices(self, epoch: int) -> Indices:
        """Return the images of an epoch, (steps · batch_size,), for this process."""
        number, within = self.schedule.locate(epoch)
        pool, part, counts = self.layouts[number]
        before = within * counts
        for i, stage in enumerate(self.schedule.stages[:number]):
            assert stage.epochs is not None
            before = before + stage.epochs * self.layouts[i][2]
        result = np.empty(len(pool), np.int64)
        for a, b in zip(*np.nonzero(counts), strict=True):
            positions = np.flatnonzero((pool == a) & (part == b))
            images = self.images[a][b]
            # The n-th draw of all processes together: they take turns.
            draw = (before[a, b] + np.arange(len(positions))) * self.world + self.rank
            for lap in np.unique(draw // len(images)):
                in_lap = draw // len(images) == lap
                order = _order(self.seed, int(a), int(b), int(lap), len(images))
                result[positions[in_lap]] = images[order[draw[in_lap] % len(images)]]
        return result

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; Lightning calls it before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        """Yield the draws of the epoch from the start position on, and go to the next epoch."""
        epoch, size = self.epoch, self.batch_size
        self.epoch += 1
        stage = self.schedule.locate(epoch)[0]
        freeze, cycle = self.schedule.stages[stage].freeze_encoder, self.task_cycles[stage]
        images = self.indices(epoch).tolist()
        first = self.start[1] if epoch == self.start[0] else 0
        for number in range(first * size, len(images)):
            position = (epoch * len(images) + number) * self.world + self.rank
            tasks = cycle[number // size % len(cycle)]
            yield Draw(images[number], position, tasks, freeze)

    def __len__(self) -> int:
        """Return the draws of an epoch and process."""
        return self.steps * self.batch_size


def spread(share: npt.NDArray[np.float64], draws: int) -> Indices:
    """Return a part for every draw, each part spread as evenly as its share allows.

    The next draw goes to the part that lags most behind its share.

    Examples:
        >>> spread(np.array([0.75, 0.25]), 8).tolist()
        [0, 0, 1, 0, 0, 0, 1, 0]
    """
    drawn = np.zeros(len(share))
    result = np.empty(draws, np.int64)
    for n in range(draws):
        result[n] = k = int(np.argmax(share * (n + 1) - drawn))
        drawn[k] += 1
    return result


@lru_cache(maxsize=64)
def _order(seed: int, pool: int, part: int, lap: int, count: int) -> Indices:
    return np.random.default_rng([seed, pool, part, lap]).permutation(count)


class ShareSampler(DistributedSampler[Any]):
    """Images `rank, rank + world, …`: disjoint shares that together are all, none twice.

    torch's `DistributedSampler` repeats images until all shares are equal, and a metric then
    counts those twice. This is a subclass of it only so that Lightning leaves it in place.
    """

    def __init__(self, images: int, rank: int, world: int) -> None:
        """Take share `rank` of `world` of so many images."""
        self._share = range(rank, images, world)

    def __iter__(self) -> Iterator[Any]:
        """Yield the numbers of the share."""
        return iter(self._share)

    def __len__(self) -> int:
        """Return the number of images in the share."""
        return len(self._share)


def check_weights(weights: Weights, names: Sequence[str]) -> dict[str, float]:
    """Return the weights by name where they are given.

    Raises:
        InputError: a weight for a source that does not exist, a source without one, a negative
            weight, or all of them 0.
    """
    if isinstance(weights, int | float):
        if not weights > 0:
            raise InputError(f"weights={weights}: expected a temperature above 0")
    elif isinstance(weights, dict):
        if weights.keys() != set(names):
            raise InputError(
                f"weights for {', '.join(weights) or 'nothing'}: expected one for each of "
                f"{', '.join(names)}"
            )
        if any(not w >= 0 for w in weights.values()) or sum(weights.values()) <= 0:
            raise InputError(f"weights {weights}: expected none negative, and a sum above 0")
        return weights
    elif weights not in ("images", "equal"):
        raise InputError(f"weights={weights!r}: expected images, equal, a temperature or a dict")
    return {}
