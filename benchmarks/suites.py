"""Measurements other than networks: metrics, folders of masks, training images, boxes."""

# B batch, H W pixels, A anchors, K classes, N boxes.

import itertools
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
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from benchmarks.peers import effdet_bench, effdet_targets
from benchmarks.timing import Row, Settings, compare
from effseg.data.files import read_lines
from effseg.data.sample import IGNORE_INDEX, pad_boxes
from effseg.data.sources.voc import VOC, find_voc
from effseg.errors import InputError
from effseg.losses.detection import assign
from effseg.metrics import SegmentationMetrics, score_folders
from effseg.models.boxes import level_size, make_anchors, postprocess

DETECTOR = "efficientdet_d0"
CLASSES, BOX_CLASSES = 21, 90
IMAGES = 64
"""Number of different images in the steps of `images`."""


def metrics(settings: Settings) -> list[Row]:
    """Time `SegmentationMetrics.update` beside torchmetrics' `MulticlassJaccardIndex`.

    Both count the same labels: patches like those of real masks, then noise, in uint8 and int64.
    """
    size, batch, device = settings.size or 512, settings.batch or 8, settings.device
    rows: list[Row] = []
    for kind, make in {"patches": make_patches, "noise": make_noise}.items():
        for dtype in (torch.uint8, torch.int64):
            preds, target = (mask.to(device, dtype) for mask in make(batch, size))
            effseg = SegmentationMetrics(CLASSES).to(device)
            torchmetrics = MulticlassJaccardIndex(
                CLASSES, ignore_index=IGNORE_INDEX, validate_args=False
            ).to(device)
            what = f"{kind}, {str(dtype).removeprefix('torch.')}"
            steps: dict[str, Callable[[], Any]] = {
                f"effseg, {what}": partial(effseg.update, preds, target),
                f"torchmetrics, {what}": partial(torchmetrics.update, preds, target),
            }
            rows += compare(steps, settings, batch)
            effseg.reset()
            torchmetrics.reset()
            for step in steps.values():
                step()
            if not torch.equal(effseg.compute()["confusion"], torchmetrics.confmat.long()):
                raise InputError(f"{what}: the two confusion matrices differ")
    return rows


def make_patches(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prediction and truth (B, H, W) uint8 like real masks.

    Convex pieces with ignored borders; the prediction is a few pixels off.
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
    """Return prediction and truth (B, H, W) uint8 of independent random pixels."""
    random = np.random.default_rng(0)
    target = random.integers(0, CLASSES, (batch, size, size), dtype=np.uint8)
    preds = random.integers(0, CLASSES, target.shape, dtype=np.uint8)
    target[random.random(target.shape) < 0.05] = IGNORE_INDEX
    return torch.from_numpy(preds), torch.from_numpy(target)


def folders(settings: Settings) -> list[Row]:
    """Time `score_folders` on VOC's val masks, a plain loop, and Pillow's decoding alone.

    The predictions are the true masks moved by a few pixels. The loop is typical user code:
    Pillow, torch, `MulticlassJaccardIndex`. Decoding uses as many threads as `score_folders`.
    """
    voc = find_voc()
    split, truth = voc / "ImageSets" / "Segmentation" / "val.txt", voc / "SegmentationClass"
    ids = read_lines(split)
    with tempfile.TemporaryDirectory() as name:
        predictions = Path(name)
        for image in ids:
            _write_moved(truth / f"{image}.png", predictions / f"{image}.png")
        paths = [folder / f"{image}.png" for folder in (predictions, truth) for image in ids]
        miou = float(score_folders(predictions, truth, split=split)["miou"])
        expected = _plain_loop(predictions, truth, ids)
        if abs(miou - expected) > 1e-4:
            raise InputError(f"score_folders gives {miou:.6f}, the plain loop {expected:.6f}")
        steps: dict[str, Callable[[], Any]] = {
            "effseg score_folders": lambda: score_folders(predictions, truth, split=split),
            "Pillow and MulticlassJaccardIndex": lambda: _plain_loop(predictions, truth, ids),
            "decoding alone": lambda: _decode(paths),
        }
        return compare(steps, settings, len(ids))


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
    for image in ids:
        pair = [
            torch.from_numpy(np.array(Image.open(folder / f"{image}.png"))).long()
            for folder in (predictions, truth)
        ]
        metric.update(*pair)
    return float(metric.compute())


def _decode(paths: Sequence[Path]) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        deque(pool.map(lambda path: Image.open(path).load(), paths), maxlen=0)


def images(settings: Settings) -> list[Row]:
    """Time training samples of VOC 2012, an image per step, on one thread.

    Scale 0.5 to 2 of the fitting one, padding, crop, flip, colour for half of the crops; compared
    with Pillow and torchvision's v2 with the same augmentation, and with decoding alone.
    """
    from effseg.data.augment import Augmentation  # needs albumentations
    from effseg.data.dataset import Dataset

    size = settings.size or 512
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        source = VOC(None, masks="train", boxes=None)
        dataset = Dataset({"voc": source}, augment=Augmentation(size, scale_relative_to="crop"))
        masks = source.folder / "SegmentationClass"
        pairs = [
            (source.image_path(i), masks / f"{source.ids[i]}.png")
            for i in range(min(IMAGES, len(source)))
        ]
        load = _torchvision(size)
        ours, theirs, plain = (itertools.cycle(range(len(pairs))) for _ in range(3))
        steps: dict[str, Callable[[], Any]] = {
            "effseg": lambda: dataset[next(ours)],
            "Pillow and torchvision v2": lambda: load(*pairs[next(theirs)]),
            "decoding alone": lambda: [Image.open(p).load() for p in pairs[next(plain)]],
        }
        return compare(steps, settings, 1, seconds=3 * settings.seconds)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _torchvision(size: int) -> Callable[[Path, Path], Any]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    from effseg.data.augment import FILL

    fill, strength = {tv_tensors.Image: FILL, tv_tensors.Mask: IGNORE_INDEX}, 0.2
    transform = v2.Compose(
        [
            v2.ScaleJitter((size, size), (0.5, 2.0)),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(strength, strength, strength, strength / 5)]),
        ]
    )

    def load(image: Path, mask: Path) -> Any:
        pixels = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(image).convert("RGB")))
        labels = tv_tensors.Mask(torch.from_numpy(np.array(Image.open(mask))))
        return transform(pixels, labels)

    return load


def assignment(settings: Settings) -> list[Row]:
    """Time the assignment of 20 boxes per image against effdet's `AnchorLabeler`."""
    size, batch, device = settings.size or 512, settings.batch or 16, settings.device
    bench = effdet_bench(DETECTOR, size).to(device)
    boxes, labels = ([x.to(device) for x in part] for part in random_boxes(batch, size))
    expected = effdet_targets(boxes, labels)
    anchors = make_anchors((size, size)).to(device)
    label = bench.anchor_labeler.batch_label_anchors
    steps: dict[str, Callable[[], Any]] = {
        "effseg assign": lambda: assign(anchors, *pad_boxes(boxes, labels)),
        "effdet AnchorLabeler": lambda: label(expected["bbox"], expected["cls"]),
    }
    return compare(steps, settings, batch)


def detections(settings: Settings) -> list[Row]:
    """Time post-processing: the best 5,000 pairs, decoding, NMS per class, 100 boxes.

    Scores are distributed like a trained detector's: most are near 0.
    """
    size, batch, device = settings.size or 512, settings.batch or 1, settings.device
    bench = effdet_bench(DETECTOR, size).to(device)
    from effdet.bench import (  # type: ignore[import-untyped]
        _batch_detection,
        _post_process,
    )

    generator = torch.Generator().manual_seed(0)
    anchors = make_anchors((size, size)).to(device)
    logits, codes = (
        torch.randn(batch, len(anchors), n, generator=generator).to(device)
        for n in (BOX_CLASSES, 4)
    )
    logits, codes = logits * 2 - 6, codes * 0.2
    maps = [_as_maps(values, size) for values in (logits, codes)]

    def effdet() -> Any:
        best = _post_process(*maps, num_levels=5, num_classes=BOX_CLASSES)
        return _batch_detection(batch, best[0], best[1], bench.anchors.boxes, *best[2:])

    steps: dict[str, Callable[[], Any]] = {
        "effseg postprocess": lambda: postprocess(logits, codes, anchors, [(size, size)] * batch),
        "effdet": effdet,
    }
    with torch.inference_mode():
        return compare(steps, settings, batch)


def _as_maps(values: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Turn (B, A, V) into effdet's maps (B, 9 V, H, W) of P3 … P7."""
    sides = [level_size((size, size), level) for level in range(3, 8)]
    parts = values.split([9 * rows * columns for rows, columns in sides], 1)
    return [
        part.reshape(len(values), *side, -1).permute(0, 3, 1, 2)
        for part, side in zip(parts, sides, strict=True)
    ]


def random_boxes(
    batch: int, size: int, classes: int = BOX_CLASSES, count: int = 20
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return boxes (N, 4) with sides of 16 pixels to half the image's, and labels, by image."""
    generator = torch.Generator().manual_seed(0)
    boxes, labels = [], []
    for _ in range(batch):
        sides = 16 + torch.rand(count, 2, generator=generator) * (size / 2 - 16)
        corners = torch.rand(count, 2, generator=generator) * (size - sides)
        boxes.append(torch.cat([corners, corners + sides], 1))
        labels.append(torch.randint(classes, (count,), generator=generator))
    return boxes, labels


SUITES = {
    "metrics": metrics,
    "folders": folders,
    "images": images,
    "assignment": assignment,
    "detections": detections,
}
