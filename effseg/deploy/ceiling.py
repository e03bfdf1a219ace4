"""What the machine can do at most, and what of it a model would need."""

# B batch, C channels, H W pixels.

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_LAYERS = (
    "convolution",
    "addmm",
    "mm",
    "bmm",
    "max_pool2d_with_indices",
    "avg_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
)
"""Operations that read and write their maps; activations and sums run within a neighbour."""


@dataclass(frozen=True)
class Ceiling:
    """The machine's speed, measured."""

    flops: float
    """Floating-point operations a second of a dense convolution."""
    bandwidth: float
    """Bytes a second, read and written, of a copy larger than the caches."""


def measure_ceiling(
    device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 1.0
) -> Ceiling:
    """Time a dense 3×3 convolution of 256 channels and a copy of 256 MB; the best run counts."""
    x = torch.randn(4, 256, 64, 64, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        took = _best(lambda: F.conv2d(x, weight, padding=1), seconds, device)
        flops = 2 * 4 * 64 * 64 * 256 * 256 * 9 / took
        source = torch.zeros(1 << 26, device=device)
        target = torch.empty_like(source)
        took = _best(lambda: target.copy_(source), seconds, device)
    return Ceiling(flops, 2 * source.numel() * source.element_size() / took)


def _best(step: Any, seconds: float, device: str) -> float:
    best = math.inf
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


class _Layers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects FLOPs and bytes of every layer that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in _LAYERS:
            return func(*args, **kwargs or {})
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **kwargs or {})
        first = result[0] if isinstance(result, tuple) else result
        tensors = [a for a in args if isinstance(a, torch.Tensor)] + [first]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        self.found.append((float(counter.get_total_flops()), float(moved)))
        return result


def roofline(model: nn.Module, photo: torch.Tensor, ceiling: Ceiling) -> float:
    """Return the least seconds of a forward pass on a machine with this ceiling.

    Each layer takes the longer of its FLOPs at the dense rate and its bytes (input, weights,
    output) at the copy's rate; layers follow one another. Convolutions, matrix products, pooling
    and resizing are layers; element-wise operations are taken as free.
    """
    with torch.no_grad(), _Layers() as layers:  # inference_mode would hide the convolutions
        model(photo)
    return math.fsum(max(f / ceiling.flops, b / ceiling.bandwidth) for f, b in layers.found)
