"""Counts summed over all processes: the loss then equals that of one large batch."""

import torch


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_processes(count: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of a float count over all processes, and the number of processes.

    A collective call: every process has to make it.
    """
    total = count.detach().clone()
    if not is_distributed():
        return total, 1
    torch.distributed.all_reduce(total)
    return total, torch.distributed.get_world_size()
