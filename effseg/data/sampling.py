"""The training stream: which image is drawn when, as a function of position and seed only."""

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


def parse_weights(weights: Weights, names: Sequence[str]) -> tuple[dict[str, float], float]:
    """Return each source's weight, and the power of its number of images, see `Part`."""
    equal = dict.fromkeys(names, 1.0)
    if weights in ("images", "equal"):
        return equal, 1.0 if weights == "images" else 0.0
    if isinstance(weights, int | float):
        if not weights > 0:
            raise InputError(f"weights={weights}: expected a temperature above 0")
        return equal, 1.0 / weights
    if not isinstance(weights, dict):
        raise InputError(f"weights={weights!r}: expected images, equal, a temperature or a dict")
    if weights.keys() != set(names):
        given, expected = ", ".join(weights) or "nothing", ", ".join(names)
        raise InputError(f"weights for {given}: expected one for each of {expected}")
    if not (all(0 <= w < np.inf for w in weights.values()) and sum(weights.values()) > 0):
        raise InputError(
            f"weights {weights}: expected finite numbers, none negative, with a sum above 0"
        )
    return weights, 0.0


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

    def task_cycle(self, labelled: Sequence[TaskName]) -> list[tuple[TaskName, ...]]:
        """Return the tasks of successive steps, to be repeated; by default the labelled ones."""
        tasks = tuple(labelled if self.tasks is None else self.tasks)
        return [(task,) for task in tasks] if self.alternate else [tasks]


@dataclass(frozen=True)
class Schedule:
    """A sequence of stages; by default one, with all tasks in every step."""

    stages: tuple[Stage, ...] = (Stage(),)

    def __post_init__(self) -> None:
        """Refuse an empty list, and a stage without a number of epochs before the last."""
        if not self.stages:
            raise InputError("stages: an empty list, expected at least one stage")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise InputError(f"stages: {stage!r}, expected an effseg.data.Stage")
        for number, stage in enumerate(self.stages[:-1], start=1):
            if stage.epochs is None:
                raise InputError(f"stage {number} of {len(self.stages)}: expected epochs")

    def check_epochs(self, epochs: int | None) -> None:
        """Refuse stages that need more than `epochs`; None or -1: no limit (InputError)."""
        needed = [stage.epochs or 1 for stage in self.stages]
        if epochs is not None and 0 <= epochs < sum(needed):
            last = self.locate(epochs - 1)[0] + 1 if epochs else 0
            raise InputError(
                f"stages: {' + '.join(map(str, needed))} epochs or more, but max_epochs={epochs} "
                f"ends in stage {last}; expected max_epochs of {sum(needed)} or more"
            )

    def locate(self, epoch: int) -> tuple[int, int]:
        """Return the number of an epoch's stage, and the epoch's number within the stage."""
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
    """The source is drawn in proportion to weight × n^power; n: images for the step's tasks."""

    def serving(self, tasks: Sequence[TaskName]) -> Indices:
        """Return the images that have a label for one of the tasks, each once."""
        images = [self.images.get(task, np.empty(0, np.int64)) for task in tasks]
        return np.unique(np.concatenate(images))


class StreamSampler(DistributedSampler[Any]):
    """Draws images from parts in fixed proportions; each part is reshuffled after every pass.

    Every batch has these proportions to within two images per part, and so has the run: a part with
    less than one image an epoch is drawn every few epochs. Processes draw different images.
    Draws depend on position and seed only: a run that starts at (epoch, batch) continues exactly as
    an uninterrupted one.

    It is a `DistributedSampler` only so that Lightning keeps it and calls `set_epoch`.

    `schedule` has the tasks of each step, for which parts without their labels are not drawn;
    `steps` are the batches of an epoch; `process` is (rank, number of processes), `start` the
    (epoch, batch) of the first draw. InputError: no image, or no positive weight for some step.
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
        self.schedule, self.seed, self.start = schedule, seed, start
        self.steps, self.batch_size = steps, batch_size
        self.rank, self.world = process
        self.epoch = start[0]
        tasks = [task for task in TASKS if any(task in part.images for part in parts)]
        cycles = [stage.task_cycle(tasks) for stage in schedule.stages]
        # A pool is a set of tasks: its parts are shuffled and counted separately.
        self.pools = sorted({pool for cycle in cycles for pool in cycle})
        self.images = [[part.serving(pool) for part in parts] for pool in self.pools]
        self.shares = [_shares(parts, pool) for pool in self.pools]
        self.layouts = []
        """The number of the pool of each draw of an epoch, by stage."""
        for cycle in cycles:
            numbers = [self.pools.index(cycle[step % len(cycle)]) for step in range(steps)]
            self.layouts.append(np.array(numbers, np.int64).repeat(batch_size))

    def _drawn(self, epoch: int) -> Indices:
        """Return how often each part (columns) was drawn for each pool (rows) before an epoch."""
        number, within = self.schedule.locate(epoch)
        epochs = [stage.epochs or 0 for stage in self.schedule.stages[:number]] + [within]
        draws = sum(
            count * np.bincount(layout, minlength=len(self.pools))
            for count, layout in zip(epochs, self.layouts, strict=False)
        )
        pairs = zip(self.shares, np.asarray(draws).tolist(), strict=True)
        return np.array([apportion(share, count) for share, count in pairs])

    def indices(self, epoch: int) -> Indices:
        """Return the images of an epoch, (steps · batch_size,), for this process."""
        pool = self.layouts[self.schedule.locate(epoch)[0]]
        before = self._drawn(epoch)
        counts = self._drawn(epoch + 1) - before
        part = np.empty(len(pool), np.int64)
        for number, count in enumerate(counts):
            part[pool == number] = _spread_counts(self.shares[number], count)
        result = np.empty(len(pool), np.int64)
        for a, b in zip(*np.nonzero(counts), strict=True):
            positions = np.flatnonzero((pool == a) & (part == b))
            images = self.images[a][b]
            # The draws of all processes are counted together: rank 0, rank 1, …, rank 0.
            draw = (before[a, b] + np.arange(len(positions))) * self.world + self.rank
            laps, places = np.divmod(draw, len(images))
            for lap in np.unique(laps):
                order = _order(self.seed, int(a), int(b), int(lap), len(images))
                result[positions[laps == lap]] = images[order[places[laps == lap]]]
        return result

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        """Yield the draws of the epoch from the start on, then step to the next epoch."""
        epoch, size = self.epoch, self.batch_size
        self.epoch += 1
        stage = self.schedule.locate(epoch)[0]
        freeze, layout = self.schedule.stages[stage].freeze_encoder, self.layouts[stage]
        images = self.indices(epoch).tolist()
        first = self.start[1] if epoch == self.start[0] else 0
        for number in range(first * size, len(images)):
            position = (epoch * len(images) + number) * self.world + self.rank
            yield Draw(images[number], position, self.pools[layout[number]], freeze)

    def __len__(self) -> int:
        """Return the draws of an epoch and process."""
        return self.steps * self.batch_size


def _shares(parts: Sequence[Part], pool: tuple[TaskName, ...]) -> npt.NDArray[np.float64]:
    """Return the share of each part in the draws for a set of tasks, summing to 1."""
    for task in pool:
        if not any(task in part.images and part.weight > 0 for part in parts):
            raise InputError(
                f"no image to draw for {task}: expected such labels, at a weight above 0"
            )
    counts = np.array([len(part.serving(pool)) for part in parts], np.float64)
    weights = np.array([p.weight * n**p.power for p, n in zip(parts, counts, strict=True)])
    weights[counts == 0] = 0.0
    return np.asarray(weights / weights.sum())


def apportion(share: npt.NDArray[np.float64], draws: int) -> Indices:
    """Return how often each part is among the first draws of a stream, never less for more draws.

    A part's n-th draw falls due at (n - 1/2) / share: rounding over the whole stream, not in each
    epoch, is what draws a part at all that has less than one image an epoch.

    Examples:
        >>> [apportion(np.array([0.9, 0.1]), draws).tolist() for draws in (4, 8, 100)]
        [[4, 0], [7, 1], [90, 10]]
    """
    # Certainly drawn; the rest, at most one and a bit for each part, in the order of their turns.
    sure = share * (draws - len(share) / 2 - 1) + 0.5
    counts = np.maximum(0, np.floor(sure)).astype(np.int64)
    for _ in range(draws - int(counts.sum())):
        with np.errstate(divide="ignore"):
            counts[np.argmin((counts + 0.5) / share)] += 1
    return counts


def _spread_counts(share: npt.NDArray[np.float64], counts: Indices) -> Indices:
    """Return a part for every draw of an epoch, evenly spread, each part as often as counted."""
    draws = int(counts.sum())
    result = spread(tuple(share.tolist()), draws)
    if np.array_equal(np.bincount(result, minlength=len(share)), counts):
        return result
    return spread(tuple((counts / draws).tolist()), draws)


@lru_cache(maxsize=16)
def spread(share: tuple[float, ...], draws: int) -> Indices:
    """Return a part for every draw: the one that lags most behind its share.

    Examples:
        >>> spread((0.75, 0.25), 8).tolist()
        [0, 0, 1, 0, 0, 0, 1, 0]
    """
    shares, drawn = np.array(share), np.zeros(len(share))
    result = np.empty(draws, np.int64)
    for n in range(draws):
        result[n] = k = int(np.argmax(shares * (n + 1) - drawn))
        drawn[k] += 1
    return result


@lru_cache(maxsize=64)
def _order(seed: int, pool: int, part: int, lap: int, count: int) -> Indices:
    return np.random.default_rng([seed, pool, part, lap]).permutation(count)
