"""Training steps (forward, loss, backward, optimiser) of our models and of the peers."""

# B batch, C channels, H W pixels, K classes, N boxes.

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effseg.data.samples import IGNORE_INDEX, Batch
from effseg.deploy.inference import make_photo
from effseg.deploy.memory import own_memory, step_memory
from effseg.deploy.peers import detection_bench, same_encoder
from effseg.deploy.rows import Row, Settings, timed
from effseg.errors import InputError
from effseg.tasks.detection import DetectionTask
from effseg.tasks.segmentation import SegmentationTask

BOXES = 20
"""Boxes a photo; none of them is very small."""
Loss = Callable[[], torch.Tensor]


def training(name: str, settings: Settings) -> list[Row]:
    """Time a training step of ``effseg_*`` or ``efficientdet_*`` and of its peers, eager, float32.

    Segmentation: smp's FPN and DeepLabV3Plus on the same encoder with torch's cross-entropy.
    Detection: effdet's training bench, which assigns boxes and computes its own loss. All are
    optimised by SGD with momentum; memory is weights, gradients, momentum and the step's peak.

    Raises:
        InputError: an unknown model, or effdet is not installed.
    """
    if settings.compile:
        raise InputError("a training step is measured eager, expected no compile")
    device = settings.device
    images = make_photo(settings.size or 320, settings.batch or 8, device)
    if name.startswith("effseg_"):
        losses = _segmentation(name, images)
    elif name.startswith("efficientdet_"):
        losses = _detection(name, images)
    else:
        raise InputError(f"training step of {name!r}: expected effseg_… or efficientdet_…")
    steps, peaks = {}, {}
    for key, (model, loss) in losses.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        steps[key] = _step(loss, optimizer)
        steps[key]()  # gradients and momentum are there from now on
        optimizer.zero_grad()
        moved = step_memory(steps[key], device)
        peaks[key] = own_memory(model, optimizer) + moved - _gradients(model)
    rows = timed(steps, settings, len(images))
    for row in rows:
        row["peak_mib"] = peaks[row["name"]] / 2**20
    return rows


def _step(loss: Loss, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _gradients(model: nn.Module) -> int:
    """Return the bytes of the gradients, which the step itself allocates."""
    return sum(
        p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None
    )


def _segmentation(name: str, images: torch.Tensor) -> dict[str, tuple[nn.Module, Loss]]:
    batch, _, height, width = images.shape
    mask = torch.randint(21, (batch, height, width), device=images.device)
    task = SegmentationTask(name, 21, {"encoder_weights": None}, ema_decay=0.0)
    found = {f"effseg {name}": _ours(task, images, {"mask": mask})}
    for key, network in same_encoder(name, ("FPN", "DeepLabV3Plus")).items():
        peer = _ready(network, images)
        found[key] = (peer, _cross_entropy(peer, images, mask))
    return found


def _cross_entropy(network: nn.Module, images: torch.Tensor, mask: torch.Tensor) -> Loss:
    return lambda: F.cross_entropy(network(images), mask, ignore_index=IGNORE_INDEX)


def _detection(name: str, images: torch.Tensor) -> dict[str, tuple[nn.Module, Loss]]:
    batch, _, size, _ = images.shape
    boxes, labels = random_boxes(batch, size, classes=90)
    boxes, labels = [b.to(images.device) for b in boxes], [x.to(images.device) for x in labels]
    task = DetectionTask(name, 90, {"encoder_weights": None}, ema_decay=0.0)
    found = {f"effseg {name}": _ours(task, images, {"boxes": boxes, "labels": labels})}
    target = {"bbox": [b[:, [1, 0, 3, 2]] for b in boxes], "cls": [x + 1 for x in labels]}
    for layout, kind in (
        ("contiguous", torch.contiguous_format),
        ("channels_last", torch.channels_last),
    ):
        bench = detection_bench(name, size).train().to(images.device).to(memory_format=kind)
        photo = images.contiguous(memory_format=kind)
        found[f"effdet {name}, {layout}"] = (bench, _bench_loss(bench, photo, target))
    return found


def _bench_loss(bench: nn.Module, photo: torch.Tensor, target: Mapping[str, Any]) -> Loss:
    def loss() -> torch.Tensor:
        value: torch.Tensor = bench(photo, target)["loss"]
        return value

    return loss


def _ours(
    task: SegmentationTask | DetectionTask, images: torch.Tensor, batch: Batch
) -> tuple[nn.Module, Loss]:
    task = task.to(images.device).train()
    return task.model, lambda: task.batch_loss(images, batch)[0]


def _ready(network: nn.Module, images: torch.Tensor) -> nn.Module:
    return network.train().to(images.device).to(memory_format=torch.channels_last)


def random_boxes(
    batch: int, size: int, classes: int, count: int = BOXES
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return boxes (N, 4) with sides of 16 pixels to half the photo's, and labels, by photo."""
    generator = torch.Generator().manual_seed(0)
    boxes, labels = [], []
    for _ in range(batch):
        sides = 16 + torch.rand(count, 2, generator=generator) * (size / 2 - 16)
        corners = torch.rand(count, 2, generator=generator) * (size - sides)
        boxes.append(torch.cat([corners, corners + sides], 1))
        labels.append(torch.randint(classes, (count,), generator=generator))
    return boxes, labels
