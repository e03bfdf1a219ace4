"""The machine's peak speed, and the share of it that a model reaches."""

# B batch, C channels, H W pixels.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Private, but torch documents the class; a public module would replace it.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from effseg.benchmark import alternate

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
"""Operations that read and write their maps; activations and sums are fused with a neighbour."""


@dataclass(frozen=True)
class Ceiling:
    """The machine's speed, measured."""

    flops: float
    """Floating-point operations per second of a dense convolution."""
    bandwidth: float
    """Bytes per second, read and written, of a copy larger than the caches."""


def measure_ceiling(
    device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 1.0
) -> Ceiling:
    """Time a dense 3×3 convolution of 256 channels and a copy of 256 MB; the best round counts."""
    x = torch.randn(4, 256, 64, 64, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], Any]] = {
        "convolution": lambda: F.conv2d(x, weight, padding=1),
        "copy": lambda: target.copy_(source),
    }
    with torch.inference_mode():
        timings = alternate(steps, rounds=5, seconds=seconds / 5, device=device)
    return Ceiling(
        2 * 4 * 64 * 64 * 256 * 256 * 9 / timings["convolution"].least,
        2 * source.numel() * source.element_size() / timings["copy"].least,
    )


class _Layers(TorchDispatchMode):
    """Collects FLOPs and bytes of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[tuple[float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in _LAYERS:
            return func(*args, **kwargs or {})
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **kwargs or {})
        first = result[0] if isinstance(result, tuple) else result
        tensors = [a for a in args if isinstance(a, torch.Tensor)] + [first]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        self.costs.append((float(counter.get_total_flops()), float(moved)))
        return result


def least_seconds(model: nn.Module, images: torch.Tensor, ceiling: Ceiling) -> float:
    """Return the least time of a forward pass, in seconds, on a machine with this ceiling.

    Each layer takes the longer of its FLOPs at the dense rate and its bytes (input, weights,
    output) at the copy's rate; layers run in sequence. Convolutions, matrix products, pooling
    and resizing are layers; element-wise operations are free.
    """
    with torch.no_grad(), _Layers() as layers:  # inference_mode would hide the convolutions
        model(images)
    return math.fsum(max(f / ceiling.flops, b / ceiling.bandwidth) for f, b in layers.costs)
