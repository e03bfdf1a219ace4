"""Which photo comes when: a stream that is a function of its position alone."""

# Draws are photos of one process, in the order of its batches.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DistributedSampler

from effseg.data.samples import TaskName
from effseg.data.schedule import Schedule
from effseg.errors import InputError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One data set of a stream: which of its photos serve which task, and how often it is drawn."""

    photos: dict[TaskName, Indices]
    """Indices of the whole stream's data set, by task; a photo may serve several."""
    weight: float = 1.0
    power: float = 1.0
    """Its share of the draws is as weight × n^power, with its n photos for the step's tasks."""

    def serving(self, tasks: Sequence[TaskName]) -> Indices:
        """Return the photos that have a label for one of the tasks."""
        found = [self.photos[task] for task in tasks if task in self.photos]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


class StreamSampler(DistributedSampler[Any]):
    """Draws photos from parts in fixed proportions, each part shuffled anew when it is through.

    After n draws of a process a part has had its share of them to within one photo, so every batch
    has the mixture to within one photo a part, in every process; processes draw different photos.
    Position decides everything: a run that starts at (epoch, batch) sees what an unbroken one sees
    from there on.

    It is a ``DistributedSampler`` only so that Lightning leaves it in place, and calls
    ``set_epoch``.

    Args:
        parts: the data sets.
        schedule: which tasks a step trains; parts that serve none of them are not drawn.
        steps: batches an epoch.
        batch_size: photos a batch and process.
        seed: of the shuffling.
        place: (rank, number of processes).
        start: (epoch, batch) of the first draw.

    Raises:
        InputError: no part, no photo, or no positive weight for some step.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        schedule: Schedule,
        *,
        steps: int,
        batch_size: int,
        seed: int,
        place: tuple[int, int] = (0, 1),
        start: tuple[int, int] = (0, 0),
    ) -> None:
        """Lay out one epoch of every stage."""
        if any(part.weight < 0 or not np.isfinite(part.weight) for part in parts):
            weights = [part.weight for part in parts]
            raise InputError(f"weights {weights}: expected finite numbers, none negative")
        self.parts, self.schedule = list(parts), schedule
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.rank, self.world = place
        self.start = start
        self.epoch = start[0]
        # A pool is a set of tasks: its parts are shuffled and counted on their own.
        self.pools = sorted({turn for stage in schedule.stages for turn in stage.turns})
        self.photos = [[part.serving(pool) for part in self.parts] for pool in self.pools]
        self.shares = [
            self._share(pool, photos) for pool, photos in zip(self.pools, self.photos, strict=True)
        ]
        self.layouts = [self._layout(number) for number in range(len(schedule.stages))]

    def _share(self, pool: tuple[TaskName, ...], photos: list[Indices]) -> npt.NDArray[np.float64]:
        weights = np.array(
            [
                part.weight * len(found) ** part.power if len(found) else 0.0
                for part, found in zip(self.parts, photos, strict=True)
            ]
        )
        for task in pool:
            drawn = [p for p, w in zip(self.parts, weights, strict=True) if w > 0]
            if not any(len(part.photos.get(task, ())) for part in drawn):
                raise InputError(
                    f"no photo to draw for {task}: expected a data set with such labels and a "
                    "weight above 0"
                )
        share: npt.NDArray[np.float64] = weights / weights.sum()
        return share

    def _layout(self, stage: int) -> tuple[Indices, Indices, Indices]:
        """Return pool and part of every draw of an epoch, and the draws of each (pool, part)."""
        turns = self.schedule.stages[stage].turns
        pool = np.array([self.pools.index(turns[s % len(turns)]) for s in range(self.steps)])
        pool = pool.repeat(self.batch_size)
        part = np.empty(len(pool), np.int64)
        for number, share in enumerate(self.shares):
            places = np.flatnonzero(pool == number)
            part[places] = spread(share, len(places))
        counts = np.zeros((len(self.pools), len(self.parts)), np.int64)
        np.add.at(counts, (pool, part), 1)
        return pool, part, counts

    def indices(self, epoch: int) -> Indices:
        """Return the photos of an epoch, (steps · batch_size,), for this process."""
        number, within = self.schedule.locate(epoch)
        pool, part, counts = self.layouts[number]
        before = within * counts
        for i, stage in enumerate(self.schedule.stages[:number]):
            assert stage.epochs is not None
            before = before + stage.epochs * self.layouts[i][2]
        result = np.empty(len(pool), np.int64)
        for a, b in zip(*np.nonzero(counts), strict=True):
            places = np.flatnonzero((pool == a) & (part == b))
            photos = self.photos[a][b]
            # The n-th draw of all processes together: they take turns.
            draw = (before[a, b] + np.arange(len(places))) * self.world + self.rank
            for lap in np.unique(draw // len(photos)):
                here = draw // len(photos) == lap
                order = _order(self.seed, int(a), int(b), int(lap), len(photos))
                result[places[here]] = photos[order[draw[here] % len(photos)]]
        return result

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; Lightning calls it before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the photos of the epoch, in the first one from the start position on.

        The next call goes on with the next epoch, unless :meth:`set_epoch` says another.
        """
        first = self.start[1] if self.epoch == self.start[0] else 0
        photos = self.indices(self.epoch)[first * self.batch_size :]
        self.epoch += 1
        return iter(photos.tolist())

    def __len__(self) -> int:
        """Return the draws of an epoch and process."""
        return self.steps * self.batch_size


def spread(share: npt.NDArray[np.float64], draws: int) -> Indices:
    """Return a part for every draw, each part as evenly spread as its share allows.

    The next draw goes to the part that lags most behind its share.

    >>> spread(np.array([0.75, 0.25]), 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    had = np.zeros(len(share))
    found = np.empty(draws, np.int64)
    for n in range(draws):
        found[n] = k = int(np.argmax(share * (n + 1) - had))
        had[k] += 1
    return found


@lru_cache(maxsize=64)
def _order(seed: int, pool: int, part: int, lap: int, count: int) -> Indices:
    return np.random.default_rng([seed, pool, part, lap]).permutation(count)
