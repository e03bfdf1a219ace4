"""``effseg benchmark MODEL``: latency, throughput and peak memory of a model on this machine."""

# B batch, C channels, H W pixels.

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from effseg.errors import InputError
from effseg.models.fold import optimize_for_inference
from effseg.models.pretrained import from_pretrained
from effseg.models.registry import create_model, list_models


@dataclass(frozen=True)
class Timing:
    """Seconds of a step over the rounds."""

    median: float
    least: float
    most: float


def alternate(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int = 9,
    seconds: float = 0.3,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time steps in alternating rounds, so that a slow moment of the machine meets all of them.

    Args:
        steps: name to what is timed; each is run twice first.
        rounds: number of rounds, at least 1.
        seconds: for about how long a round repeats each step.
        device: ``cuda`` waits for the device after every round.
    """

    def run(step: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    counts: dict[str, int] = {}
    for name, step in steps.items():
        run(step, 1)
        counts[name] = max(1, round(seconds / run(step, 1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(run(step, counts[name]))
    finally:
        if enabled:
            gc.enable()
    return {k: Timing(statistics.median(t), min(t), max(t)) for k, t in times.items()}


def step_memory(step: Callable[[], Any], device: str = "cpu") -> int:
    """Return the bytes by which a step's peak lies above what is allocated when it starts.

    On the CPU every allocation of tensors is added up (a library's scratch memory is not one of
    them); CUDA counts by itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's library would write to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    assert run.profiler is not None and run.profiler.kineto_results is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def model_memory(model: nn.Module) -> int:
    """Return the bytes of weights and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def benchmark(
    source: str,
    size: int | None = None,
    batch: int = 1,
    rounds: int = 9,
    compile: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time the forward pass of a model as built, optimised and, on request, compiled.

    Args:
        source: a name of :func:`effseg.list_models` (random weights), or what
            :func:`effseg.from_pretrained` takes.
        size: side of the square images, pixels; None: a detector's own size, else 512.
        batch: B.
        rounds: in which the three alternate.
        compile: time the optimised model with ``torch.compile``, too.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``model``, ``size``, ``batch``, ``device``, ``threads``, ``torch``, and ``rows``: a dict of
        ``name``, ``ms`` (median), ``least``, ``most``, ``images_per_second`` and ``peak_mib``
        (weights and the peak of a step) for each form.

    Raises:
        InputError: a model that is not there, a number below 1, or no such device.
    """
    for key, value in {
        "size": 1 if size is None else size,
        "batch": batch,
        "rounds": rounds,
    }.items():
        if value < 1:
            raise InputError(f"{key}={value}: expected at least 1")
    model = create_model(source) if source in list_models() else from_pretrained(source)
    if size is None:
        size = int(model.size) if model.tasks == ("detection",) else 512
    try:
        model = model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    images = torch.randn(batch, len(model.preprocess_cfg["mean"]), size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    forms = {"as built": model, "optimised": optimize_for_inference(model)}
    if compile:
        forms["compiled"] = optimize_for_inference(model, compile=True)

    def step(form: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                form(images)

        return run

    steps = {name: step(form) for name, form in forms.items()}
    timings = alternate(steps, rounds, device=device)
    rows = [
        {
            "name": name,
            "ms": 1000 * timing.median,
            "least": 1000 * timing.least,
            "most": 1000 * timing.most,
            "images_per_second": batch / timing.median,
            "peak_mib": (model_memory(forms[name]) + step_memory(steps[name], device)) / 2**20,
        }
        for name, timing in timings.items()
    ]
    return {"model": source, "size": size, "batch": batch, **machine(device), "rows": rows}


def machine(device: str) -> dict[str, Any]:
    """Name the device, the threads and torch's version."""
    cpu = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
