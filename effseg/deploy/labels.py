"""Counting label maps: the metric alone, and two folders of PNGs."""

# B images, K classes, H W pixels.

import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from effseg.data.voc import find_voc
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from effseg.data.files import read_lines
from effseg.data.sample import IGNORE_INDEX
from effseg.deploy.rows import Row, Settings, timed
from effseg.errors import InputError
from effseg.metrics import SegmentationMetrics, score_folders

CLASSES = 21


def metrics(settings: Settings) -> list[Row]:
    """Time ``SegmentationMetrics.update`` beside torchmetrics' ``MulticlassJaccardIndex``.

    Both count the same labels: patches like those of real masks, then noise, in uint8 and int64.

    Raises:
        InputError: the two count differently.
    """
    size, batch, device = settings.size or 512, settings.batch or 8, settings.device
    found: list[Row] = []
    for kind, make in {"patches": make_patches, "noise": make_noise}.items():
        for dtype in (torch.uint8, torch.int64):
            preds, target = (mask.to(device, dtype) for mask in make(batch, size))
            ours = SegmentationMetrics(CLASSES).to(device)
            theirs = MulticlassJaccardIndex(
                CLASSES, ignore_index=IGNORE_INDEX, validate_args=False
            ).to(device)
            what = f"{kind}, {str(dtype).removeprefix('torch.')}"
            steps: dict[str, Callable[[], Any]] = {
                f"effseg, {what}": partial(ours.update, preds, target),
                f"torchmetrics, {what}": partial(theirs.update, preds, target),
            }
            found += timed(steps, settings, batch, seconds=0.1)
            ours.reset()
            theirs.reset()
            for step in steps.values():
                step()
            if not torch.equal(ours.compute()["confusion"], theirs.confmat.long()):
                raise InputError(f"{what}: the two confusion matrices differ")
    return found


def make_patches(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prediction and truth (B, H, W) uint8 like real masks.

    Convex pieces with void borders; the prediction is a few pixels off.
    """
    random = np.random.default_rng(0)
    target = np.zeros((batch, size, size), np.uint8)
    preds = target.copy()
    for truth, prediction in zip(target, preds, strict=True):
        for label in random.integers(1, CLASSES, 3).tolist():
            x, y = (int(v) for v in random.integers(size // 5, size - size // 5, 2))
            axes = tuple(int(v) for v in random.integers(size // 16, size // 4, 2))
            cv2.ellipse(truth, (x, y), axes, 0, 0, 360, label, -1)
            cv2.ellipse(truth, (x, y), axes, 0, 0, 360, IGNORE_INDEX, 5)
            cv2.ellipse(prediction, (x + 4, y + 5), axes, 0, 0, 360, label, -1)
    return torch.from_numpy(preds), torch.from_numpy(target)


def make_noise(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prediction and truth (B, H, W) uint8 with every pixel drawn by itself."""
    random = np.random.default_rng(0)
    target = random.integers(0, CLASSES, (batch, size, size), dtype=np.uint8)
    preds = random.integers(0, CLASSES, target.shape, dtype=np.uint8)
    target[random.random(target.shape) < 0.05] = IGNORE_INDEX
    return torch.from_numpy(preds), torch.from_numpy(target)


def folders(settings: Settings) -> list[Row]:
    """Time ``score_folders`` on VOC's val masks, a plain loop, and Pillow's decoding alone.

    The predictions are the true masks moved by a few pixels. The loop is what a user writes:
    Pillow, torch, ``MulticlassJaccardIndex``. Decoding alone has as many threads as
    ``score_folders``.

    Raises:
        InputError: no VOC 2012 (EFFSEG_DATA), or the two scores differ.
    """
    voc = find_voc()
    split = voc / "ImageSets" / "Segmentation" / "val.txt"
    ids, truth = read_lines(split), voc / "SegmentationClass"
    with tempfile.TemporaryDirectory() as name:
        predictions = Path(name)
        for photo in ids:
            _write_moved(truth / f"{photo}.png", predictions / f"{photo}.png")
        paths = [folder / f"{photo}.png" for folder in (predictions, truth) for photo in ids]
        ours = score_folders(predictions, truth, split=split)["miou"]
        theirs = _plain_loop(predictions, truth, ids)
        if abs(float(ours) - theirs) > 1e-4:
            raise InputError(f"score_folders gives {float(ours):.6f}, the plain loop {theirs:.6f}")
        steps: dict[str, Callable[[], Any]] = {
            "effseg score_folders": lambda: score_folders(predictions, truth, split=split),
            "Pillow and MulticlassJaccardIndex": lambda: _plain_loop(predictions, truth, ids),
            "decoding alone": lambda: _decode(paths),
        }
        return timed(steps, settings, len(ids))


def _write_moved(source: Path, target: Path) -> None:
    with Image.open(source) as mask:
        values = np.roll(np.asarray(mask), (3, 4), (0, 1))
        palette = mask.getpalette()
    moved = Image.fromarray(np.where(values == IGNORE_INDEX, 0, values).astype(np.uint8))
    if palette:
        moved.putpalette(palette)
    moved.save(target)


def _plain_loop(predictions: Path, truth: Path, ids: Sequence[str]) -> float:
    metric = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORE_INDEX)
    for photo in ids:
        pair = [
            torch.from_numpy(np.array(Image.open(folder / f"{photo}.png"))).long()
            for folder in (predictions, truth)
        ]
        metric.update(*pair)
    return float(metric.compute())


def _decode(paths: Sequence[Path]) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        deque(pool.map(lambda path: Image.open(path).load(), paths), maxlen=0)
