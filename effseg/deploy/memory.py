"""Peak memory of a training step, on any device."""

# B batch, C channels, H W pixels.

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def step_memory(step: Callable[[], Any], device: str = "cpu") -> int:
    """Return the bytes by which a step's peak lies above what is allocated when it starts.

    On the CPU every allocation of tensors is added up (the scratch memory of a convolution's
    library is not one of them); CUDA counts itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    assert run.profiler is not None and run.profiler.kineto_results is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def own_memory(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Return the bytes of weights, buffers, gradients and the optimiser's state."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    if optimizer is not None:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
