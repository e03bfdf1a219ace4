"""`effseg fit --plan`: what a training would do, and how long one step takes on this machine."""

import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from effseg.data.datamodule import ImageDataModule
from effseg.data.dataset import flatten
from effseg.data.sample import TASKS
from effseg.models.registry import summary
from effseg.training.task import TrainingTask

_STEPS = 3


def print_plan(
    task: TrainingTask, data: ImageDataModule, epochs: int, device: torch.device
) -> None:
    """Print sources, model, number of steps, and the time and memory of the first ones.

    Args:
        task: the training task; its weights are not changed.
        data: after `setup("fit")`.
        epochs: of the training; -1: no end.
        device: on which steps are timed.
    """
    console = Console(highlight=False)
    table = Table(title="data", title_justify="left")
    for column in ("source", "images", "with masks", "with boxes"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for used, sources in (("train", data.train), ("val", data.val)):
        for name, source in flatten(sources):
            labelled = [int(source.has(kind).sum()) for kind in TASKS]
            table.add_row(f"{used}.{name}", *map(str, (len(source), *labelled)))
    console.print(table)
    loader = data.train_dataloader()
    crop = data.crop_size if isinstance(data.crop_size, int) else max(data.crop_size)
    cost = summary(task.model, crop)
    print(
        f"model: {task.model_name}, {len(task.classes)} classes with the background, "
        f"{cost['params'] / 1e6:.2f} M parameters, {cost['macs'] / 1e9:.2f} GMACs at {crop}²"
    )
    steps = len(loader)
    total = "no end" if epochs < 0 else f"{epochs} epochs, {steps * epochs:,} steps"
    print(f"schedule: {data.batch_size} crops a step, {steps:,} steps an epoch, {total}")
    seconds, memory = _time_steps(task, loader, device)
    line = f"a step: {seconds:.2f} s on {device}"
    if memory is not None:
        line += f", peak memory {memory / 2**20:,.0f} MiB"
    if epochs >= 0:
        minutes = seconds * steps * epochs / 60
        time_needed = f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
        line += f"; about {time_needed} without evaluation and without waiting for images"
    print(line)


def _time_steps(task: TrainingTask, loader: Any, device: torch.device) -> tuple[float, int | None]:
    """Return the median seconds of a step and the peak memory in bytes, None if unknown."""
    task.to(device).train()
    batches = iter(loader)
    seconds = []
    for _ in range(_STEPS):
        batch = next(batches, None)
        if batch is None:
            break
        moved = task.transfer_batch_to_device(batch, device, 0)
        start = time.perf_counter()
        images, tasks = task.prepare(moved)
        task.criterion(images, moved, tasks)["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        task.zero_grad()
    if device.type == "cuda":
        return statistics.median(seconds), torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return statistics.median(seconds), None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
