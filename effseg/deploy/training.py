"""Training steps (forward, loss, backward, optimiser) of our models and of the peers."""

# B batch, C channels, H W pixels, K classes, N boxes.

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effseg.data.sample import IGNORE_INDEX
from effseg.deploy.inference import make_photo
from effseg.deploy.memory import own_memory, step_memory
from effseg.deploy.peers import LAYOUTS, detection_bench, same_encoder
from effseg.deploy.rows import Row, Settings, timed
from effseg.errors import InputError
from effseg.losses.detection import DetectionLoss, assign, pad_boxes
from effseg.losses.segmentation import SegmentationLoss
from effseg.models.registry import create_model

BOXES = 20
"""Boxes a photo; none of them is very small."""
Loss = Callable[[], torch.Tensor]


def training(name: str, settings: Settings) -> list[Row]:
    """Time a training step of a model and of its peers, eager, in float32.

    All are optimised by SGD with momentum; memory is weights, gradients, momentum and the peak of
    the step.

    Raises:
        InputError: no ``effseg_*`` or ``efficientdet_*``.
    """
    if settings.compile:
        raise InputError("a training step is measured eager, expected no compile")
    images = make_photo(settings.size or 320, settings.batch or 8, settings.device)
    steps, peaks = {}, {}
    for key, (model, loss) in losses(name, images).items():
        steps[key], optimizer = training_step(model, loss)
        peaks[key] = training_memory(model, steps[key], optimizer, settings.device)
    rows = timed(steps, settings, len(images))
    for row in rows:
        row["peak_mib"] = peaks[row["name"]] / 2**20
    return rows


def losses(name: str, images: torch.Tensor) -> dict[str, tuple[nn.Module, Loss]]:
    """Return network and loss of a model and its peers, on random labels.

    Segmentation: smp's FPN and DeepLabV3Plus on the same encoder with torch's cross-entropy.
    Detection: effdet's training bench, which assigns boxes and computes its own loss, if effdet is
    installed.

    Args:
        name: ``effseg_*`` or ``efficientdet_*``.
        images: (B, 3, H, W), square for a detector.

    Raises:
        InputError: another name.
    """
    if name.startswith("effseg_"):
        return _segmentation(name, images)
    if name.startswith("efficientdet_"):
        return _detection(name, images)
    raise InputError(f"training step of {name!r}: expected effseg_… or efficientdet_…")


def training_step(model: nn.Module, loss: Loss) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return a step (forward, loss, backward, SGD with momentum) and its optimiser."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, optimizer


def training_memory(
    model: nn.Module, step: Callable[[], None], optimizer: torch.optim.Optimizer, device: str
) -> int:
    """Return the bytes that training needs: weights, momentum, and the peak of a step."""
    step()  # from now on the momentum is there
    optimizer.zero_grad()
    return own_memory(model, optimizer) + step_memory(step, device)


def _segmentation(name: str, images: torch.Tensor) -> dict[str, tuple[nn.Module, Loss]]:
    batch, _, height, width = images.shape
    mask = torch.randint(21, (batch, height, width), device=images.device)
    ours = _ready(create_model(name, classes=21), images)
    criterion = SegmentationLoss()

    def loss() -> torch.Tensor:
        total: torch.Tensor = criterion(ours.outputs(images, coarse=True).masks, mask)[0]
        return total

    found: dict[str, tuple[nn.Module, Loss]] = {f"effseg {name}": (ours, loss)}
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
    ours = _ready(create_model(name, classes=90), images)
    criterion = DetectionLoss()

    def loss() -> torch.Tensor:
        anchors = ours.anchors((size, size), images.device)
        targets = assign(anchors, *pad_boxes(boxes, labels))
        total: torch.Tensor = criterion(*ours(images), targets)[0]
        return total

    found: dict[str, tuple[nn.Module, Loss]] = {f"effseg {name}": (ours, loss)}
    if importlib.util.find_spec("effdet") is None:
        return found
    target = {"bbox": [b[:, [1, 0, 3, 2]] for b in boxes], "cls": [x + 1 for x in labels]}
    for layout, kind in LAYOUTS.items():
        bench = detection_bench(name, size).train().to(images.device).to(memory_format=kind)
        photo = images.contiguous(memory_format=kind)
        found[f"effdet {name}, {layout}"] = (bench, _bench_loss(bench, photo, target))
    return found


def _bench_loss(bench: nn.Module, photo: torch.Tensor, target: Mapping[str, Any]) -> Loss:
    def loss() -> torch.Tensor:
        value: torch.Tensor = bench(photo, target)["loss"]
        return value

    return loss


def _ready(network: Any, images: torch.Tensor) -> Any:
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
