"""Who reads which sample, and with which random stream: samplers and worker seeds."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    get_worker_info,
)

from effseg.data.samples import TASKS, Sample, collate_list, collate_stack
from effseg.data.sampling import Part, StreamSampler
from effseg.data.schedule import Schedule
from effseg.errors import InputError


def train_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    num_workers: int,
    seed: int,
    start: tuple[int, int] = (0, 0),
    parts: Sequence[Part] | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
) -> DataLoader[Sample]:
    """Return the loader of training: shuffled, crops stacked, full batches only.

    Order and augmentation follow from the seed, the start, the number of workers and of processes,
    and from nothing else: two models trained with one seed see the same crops.

    Args:
        dataset: its samples must all have one size.
        batch_size: photos a step and process.
        num_workers: worker processes; 0 reads in this one.
        seed: of order and augmentation.
        start: (epoch, batch) at which the run begins; the order of the photos from there on is an
            unbroken run's.
        parts: what the data set is made of; None: one part, for every task.
        schedule: which tasks a step trains; None: all.
        steps: batches an epoch; None: as many as the data set has photos for.

    Raises:
        InputError: fewer photos (a process) than one batch.
    """
    rank, world = _place()
    count = _length(dataset)
    share = count // world
    if share < batch_size:
        raise InputError(
            f"batch_size {batch_size}: only {share} training photos a process, "
            "expected at least one full batch"
        )
    everything = np.arange(count)
    sampler = StreamSampler(
        parts or [Part(dict.fromkeys(TASKS, everything))],
        schedule or Schedule(),
        # BatchNorm fails on one photo where a pyramid level is 1x1: no last, smaller batch.
        steps=steps or share // batch_size,
        batch_size=batch_size,
        seed=_mix(seed),
        place=(rank, world),
        start=start,
    )
    seed_transform(dataset, _mix(seed, *start, rank))  # for num_workers=0
    return _loader(
        dataset,
        batch_size,
        num_workers,
        sampler=sampler,
        generator=torch.Generator().manual_seed(_mix(seed, *start)),  # of the workers' seeds
        drop_last=True,
        collate_fn=collate_stack,
        worker_init_fn=functools.partial(seed_worker, rank=rank),
    )


def eval_loader(dataset: Dataset[Sample], batch_size: int, num_workers: int) -> DataLoader[Sample]:
    """Return the loader of evaluation: every photo once, in order, at its own size.

    Under several processes each reads its own share; no photo is counted twice.

    Raises:
        InputError: fewer photos than processes.
    """
    rank, world = _place()
    if _length(dataset) < world:
        # A process without a batch would miss the collective calls of the others, and hang them.
        raise InputError(f"{_length(dataset)} evaluation photos for {world} processes")
    return _loader(
        dataset,
        batch_size,
        num_workers,
        sampler=ShareSampler(dataset, rank, world),
        collate_fn=collate_list,
        worker_init_fn=functools.partial(seed_worker, rank=rank),
    )


class ShareSampler(DistributedSampler[Sample]):
    """Photos ``rank, rank + world, …``: disjoint shares that together are the data set.

    torch's ``DistributedSampler`` repeats photos until all shares are equal, and a metric then
    counts those twice. This is a subclass of it only so that Lightning leaves it in place.
    """

    def __init__(self, dataset: Dataset[Sample], rank: int, world: int) -> None:
        """Take share ``rank`` of ``world``."""
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=False)
        self._share = range(rank, _length(dataset), world)

    def __iter__(self) -> Iterator[Any]:
        """Yield the indices of the share."""
        return iter(self._share)

    def __len__(self) -> int:
        """Return the number of photos in the share."""
        return len(self._share)


def seed_worker(worker_id: int, rank: int = 0) -> None:
    """Give this worker process its own random stream; to be the loader's ``worker_init_fn``.

    albumentations 2.0.8 would give every worker the same stream, and repeat it each epoch
    (AlbumentationsX issue 266). The processes of a node start from one base seed, so the rank goes
    in as well.
    """
    import cv2  # only workers and the shapes need it

    cv2.setNumThreads(0)  # workers are the parallelism: more threads would fight over the cores
    info = get_worker_info()
    if info is not None:
        seed_transform(info.dataset, _mix(torch.initial_seed(), rank))


def seed_transform(dataset: object, seed: int) -> None:
    """Seed the ``transform`` of a data set and of those inside it (``Subset``, ``ConcatDataset``).

    A transform without ``set_random_seed`` is left alone.
    """
    transform: Any = getattr(dataset, "transform", None)
    if hasattr(transform, "set_random_seed"):
        transform.set_random_seed(seed)
    inner = [*getattr(dataset, "datasets", ()), getattr(dataset, "dataset", None)]
    for number, part in enumerate(part for part in inner if part is not None):
        seed_transform(part, _mix(seed, number))


def _loader(
    dataset: Dataset[Sample], batch_size: int, num_workers: int, **options: Any
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _place() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _length(dataset: Dataset[Sample]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def _mix(*parts: int) -> int:
    """Return one 32-bit seed for a tuple of numbers; near tuples give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
