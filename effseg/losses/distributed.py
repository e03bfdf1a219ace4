"""Counts over all processes: a loss is then that of one large batch."""

import torch


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_processes(count: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of a float count over all processes, and their number.

    Every process has to call it: the others wait for it.
    """
    total = count.detach().clone()
    if not is_distributed():
        return total, 1
    torch.distributed.all_reduce(total)
    return total, torch.distributed.get_world_size()
