"""What processes that train or evaluate together exchange; a single process needs no group."""

from collections.abc import Sequence
from typing import TypeVar

import torch

Row = TypeVar("Row")


def is_distributed() -> bool:
    """Whether this is one of several processes that work together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes."""
    if not is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sum_over_processes(count: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of a float count over all processes, and the number of processes.

    A collective call: every process has to make it.
    """
    total = count.detach().clone()
    if not is_distributed():
        return total, 1
    torch.distributed.all_reduce(total)
    return total, torch.distributed.get_world_size()


def of_all_processes(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of all processes, whose numbers may differ; a collective call."""
    if not is_distributed():
        return list(rows)
    shares: list[list[Row]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, list(rows))
    return [row for share in shares for row in share]
