"""`effseg fit --plan`: what a training would do, and how long one step takes on this machine."""

import itertools
import math
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

_BATCHES = 3


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
    data.serve(task.model_name, task.model.tasks)
    loader = data.train_dataloader()
    crop = data.crop_size if isinstance(data.crop_size, int) else max(data.crop_size)
    cost = summary(task.model, crop)
    print(
        f"model: {task.model_name}, {len(task.classes)} classes with the background, "
        f"{cost['params'] / 1e6:.2f} M parameters, {cost['macs'] / 1e9:.2f} GMACs at {crop}²"
    )
    at_once, device = trainer.accumulate_grad_batches, trainer.strategy.root_device
    # Not len(loader): the other processes have not been started.
    images = loader.dataset.count(data.heads)  # type: ignore[attr-defined]
    batches = data.steps or images // trainer.world_size // data.batch_size
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = math.ceil(batches / at_once)
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    ends = [end for end in (steps * epochs, trainer.max_steps) if end >= 0]  # -1: no end
    total = f"{min(ends):,} steps" if ends else "no end"
    total = f"{epochs} epochs, {total}" if epochs >= 0 else total
    crops = data.batch_size * trainer.world_size * at_once
    print(f"schedule: {crops} crops a step, {steps:,} steps an epoch, {total}")
    with trainer.precision_plugin.train_step_context():
        seconds, memory = _time_batches(task, loader, device)
    seconds *= at_once
    line = f"a step: {seconds:.2f} s on {device}"
    if memory is not None:
        line += f", peak memory {memory / 2**20:,.0f} MiB"
        line += f" with {task.optim.name}'s state" if device.type == "cuda" else ""
    if ends:
        minutes = seconds * min(ends) / 60
        time_needed = f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
        line += f"; about {time_needed} without evaluation and without waiting for images"
    print(line)


def _time_batches(
    task: TrainingTask, loader: Any, device: torch.device
) -> tuple[float, int | None]:
    """Return the median seconds of a batch and the peak memory in bytes, None if unknown."""
    task.to(device).train()
    seconds = []
    for batch in itertools.islice(loader, _BATCHES):
        moved = task.transfer_batch_to_device(batch, device, 0)
        start = time.perf_counter()
        images, tasks = task.prepare(moved)
        task.criterion(images, moved, tasks)["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        task.zero_grad()
    median = statistics.median(seconds)
    if device.type == "cuda":
        weights = sum(p.nbytes for p in task.parameters() if p.requires_grad)
        state = weights * (2 if task.optim.name == "adamw" else 1)  # no optimiser has run here
        return median, torch.cuda.max_memory_allocated(device) + state
    if sys.platform == "win32":
        return median, None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return median, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
