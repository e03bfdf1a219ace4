"""`effseg benchmark MODEL`: latency, memory and agreement of a model and its exported files."""

# B batch, C channels, H W pixels.

import gc
import importlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from effseg.errors import InputError, needs
from effseg.export.files import export_model
from effseg.export.graph import labels_of
from effseg.export.parity import drawn_images
from effseg.inference import backends
from effseg.models.fold import optimize_for_inference
from effseg.models.network import DetectionOutput, JointOutput
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
    """Time steps in alternating rounds, so that a slow moment of the machine affects all of them.

    A round repeats each step for about `seconds`; on `cuda` it then waits for the device.
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
    """Return the bytes by which a step's peak exceeds what is allocated when it starts.

    On the CPU the allocations of tensors are added up, without a library's scratch memory; CUDA
    counts by itself.
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
    # Private: the profiler's public tables have no peak, only sums.
    assert run.profiler is not None and run.profiler.kineto_results is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def model_memory(model: nn.Module) -> int:
    """Return the bytes of weights and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def resident_growth(step: Callable[[], Any]) -> int | None:
    """Return the bytes by which a step raises the peak of resident memory; None without Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        step()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        step()
        return None


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@dataclass
class Form:
    """One way to run a model: its step, its size and memory in bytes, its class map."""

    step: Callable[[], Any]
    size: int
    memory: int | None
    classes: list[torch.Tensor]
    """The class of every pixel, and of every anchor."""


def benchmark(
    source: str,
    size: int | None = None,
    batch: int = 1,
    rounds: int = 9,
    compile: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time a model's forward pass: as built, optimised, compiled, and by other engines.

    Engines run on the CPU with as many threads as torch, from files of
    `effseg.export.files.export_model`, in which the boxes of all anchors are decoded, too; with
    `cuda` there are none. A name of `effseg.list_models` has random weights, an exported file is
    timed alone. The image is drawn. The arguments are those of the command.

    Returns:
        `model`, `size`, `batch`, `device`, `threads`, `torch`, `notes` (engines that
        were left out, and why), and `rows`: for each form `name`, `ms` (median), `least`,
        `most`, `images_per_second`, `peak_mib` (of torch: weights and the peak of a step; of
        an engine: growth of resident memory by opening the file and a first run, None without
        Linux), `size_mib` (weights, or the file) and `agreement` (share of pixels, and of
        anchors, with the class that the first row has; the lower of the two).

    Raises:
        InputError: no such model or device, a number below 1, or an exported file with `compile` or
            `cuda`.
    """
    for key, value in (("size", size), ("batch", batch), ("rounds", rounds)):
        if value is not None and value < 1:
            raise InputError(f"{key}={value}: expected at least 1")
    notes: list[str] = []
    if backends.is_exported(source):
        if compile or device != "cpu":
            raise InputError(
                f"{source}: an exported file runs on the CPU as it is, expected no compile and no "
                f"device {device}"
            )
        file = backends.open(source)
        side = size or file.fixed_size or (512 if file.seg_classes else file.size)
        forms = {file.path.suffix[1:]: _file_form(file.path, _images(file, side, batch))}
    else:
        model = create_model(source) if source in list_models() else from_pretrained(source)
        model = backends.on_device(model.eval().requires_grad_(False), device)
        side = size or (int(model.size) if model.tasks == ("detection",) else 512)
        images = _images(model, side, batch)
        forms = _torch_forms(model, images, compile)
        if device == "cpu":
            forms |= _engine_forms(model, images, notes)
    timings = alternate({name: form.step for name, form in forms.items()}, rounds, device=device)
    expected = next(iter(forms.values())).classes
    rows = []
    for name, timing in timings.items():
        form = forms[name]
        pairs = zip(form.classes, expected, strict=True)
        row = {
            "name": name,
            "ms": 1000 * timing.median,
            "least": 1000 * timing.least,
            "most": 1000 * timing.most,
            "images_per_second": batch / timing.median,
            "peak_mib": None if form.memory is None else form.memory / 2**20,
            "size_mib": form.size / 2**20,
            "agreement": min(float((a == b).float().mean()) for a, b in pairs),
        }
        rows.append(row)
    report = {"model": source, "size": side, "batch": batch, **machine(device)}
    return report | {"notes": notes, "rows": rows}


def _images(model: Any, side: int, batch: int) -> torch.Tensor:
    square = drawn_images(side, len(model.preprocess_cfg["mean"]))[2].to(model.mean.device)
    images: torch.Tensor = model.normalise(square).repeat(batch, 1, 1, 1)
    return images


def _torch_forms(model: Any, images: torch.Tensor, compile: bool) -> dict[str, Form]:
    models = {"as built": model, "optimised": optimize_for_inference(model)}
    if compile:
        models["compiled"] = optimize_for_inference(model, compile=True)
    x = images.contiguous(memory_format=torch.channels_last)
    forms: dict[str, Form] = {}
    for name, one in models.items():

        def step(one: Any = one) -> Any:
            with torch.inference_mode():
                return one(x)

        size = model_memory(one)
        memory = size + step_memory(step, images.device.type)
        output = step()
        if isinstance(output, DetectionOutput):
            output = JointOutput(None, output)
        masks, boxes = output if isinstance(output, JointOutput) else (output, None)
        scores = None if boxes is None else boxes.class_logits
        forms[name] = Form(step, size, memory, _classes(masks, scores))
    return forms


def _engine_forms(model: Any, images: torch.Tensor, notes: list[str]) -> dict[str, Form]:
    """Export the model for every engine; one that is not installed becomes a line of `notes`."""
    forms: dict[str, Form] = {}
    side, batch = images.shape[-1], len(images)
    fixed: Any = side if side % int(model.encoder.output_stride) == 0 else "dynamic"
    raw = "detection" in model.tasks
    engines: tuple[tuple[str, str, Any], ...] = (
        ("ONNX Runtime", "onnxruntime", "onnx"),
        ("OpenVINO", "openvino", "openvino"),
    )
    for name, module, format in engines:
        try:
            with needs("export"):
                importlib.import_module(module)  # not to be counted as the model's memory
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"model{backends.SUFFIXES[format]}"
                export_model(model, path, format, size=fixed, batch=batch, raw=raw, compare=False)
                forms[name] = _file_form(path, images)
        except InputError as error:
            notes.append(f"{name}: {error}")
    return forms


def _file_form(path: Path, images: torch.Tensor) -> Form:
    files: list[backends.ExportedModel] = []

    def step() -> list[torch.Tensor]:
        return files[0].run(images)

    def first() -> None:
        files.append(backends.open(path))
        step()

    memory = resident_growth(first)
    outputs = dict(zip(files[0].metadata["outputs"], step(), strict=True))
    masks = outputs.get("logits", outputs.get("labels"))
    scores = outputs.get("scores")
    return Form(step, backends.file_size(path), memory, _classes(masks, scores))


def _classes(masks: torch.Tensor | None, scores: torch.Tensor | None) -> list[torch.Tensor]:
    results = [] if masks is None else [labels_of(masks) if masks.ndim == 4 else masks]
    return results if scores is None else [*results, scores.argmax(-1)]


def machine(device: str) -> dict[str, Any]:
    """Name the device, the threads and torch's version."""
    cpu = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
