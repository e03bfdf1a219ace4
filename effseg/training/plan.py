"""`effseg fit --plan`: what a training would do, and how long one step takes on this machine."""

import itertools
import statistics
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console

from effseg.data.datamodule import ImageDataModule
from effseg.data.sample import TASKS
from effseg.metrics.tables import as_table
from effseg.models.registry import summary
from effseg.training.task import TrainingTask

_STEPS = 3


def print_plan(task: TrainingTask, data: ImageDataModule, trainer: Trainer) -> None:
    """Print sources, model, number of steps, and the time and memory of the first ones.

    The weights of the task do not change; `data` are those after `setup("fit")`.
    """
    columns = ("source", "images", "with masks", "with boxes")
    rows = [
        [name, *map(str, (len(source), *(int(source.has(kind).sum()) for kind in TASKS)))]
        for name, source in data.sources()
    ]
    Console(highlight=False).print(as_table("data", columns, rows))
    loader = data.train_dataloader()
    crop = data.crop_size if isinstance(data.crop_size, int) else max(data.crop_size)
    cost = summary(task.model, crop)
    print(
        f"model: {task.model_name}, {len(task.classes)} classes with the background, "
        f"{cost['params'] / 1e6:.2f} M parameters, {cost['macs'] / 1e9:.2f} GMACs at {crop}²"
    )
    steps = len(loader)
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    total = "no end" if epochs < 0 else f"{epochs} epochs, {steps * epochs:,} steps"
    print(f"schedule: {data.batch_size} crops a step, {steps:,} steps an epoch, {total}")
    device = trainer.strategy.root_device
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
    seconds = []
    for batch in itertools.islice(loader, _STEPS):
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
