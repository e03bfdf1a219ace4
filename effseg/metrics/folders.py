"""Score a folder of predicted masks against a folder of true masks."""

# K classes, H W pixels

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from effseg.data.files import read_indices, read_lines
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError
from effseg.metrics.boundary import boundary_counts, boundary_scores
from effseg.metrics.confusion import (
    ALL_KNOWN,
    count_bytes,
    count_ignored,
    count_pairs,
    describe_unknown,
    largest_unknown,
    scores,
)

Counts = npt.NDArray[np.int64]


def score_folders(
    pred_dir: str | Path,
    gt_dir: str | Path,
    num_classes: int = 21,
    ignore_index: int | None = IGNORE_INDEX,
    split: str | Path | None = None,
    workers: int | None = None,
    progress: bool = False,
    boundary: bool = False,
) -> dict[str, Any]:
    """Score predicted masks, one PNG an image, by dataset-level mIoU.

    Every ``ID.png`` of ``gt_dir``, or of the split, is compared with ``pred_dir/ID.png``. Both hold
    class indices, as palette or grey. The suffix may be ``.PNG``; hidden files, and other files in
    ``pred_dir``, are left alone.

    Args:
        pred_dir: folder of predictions.
        gt_dir: folder of true masks.
        num_classes: K, background included.
        ignore_index: true value of the pixels that are not counted, or None.
        split: text file with one id (the file's stem) a line, of which the first word is read;
            without it, all of ``gt_dir``.
        workers: number of threads; as many as there are cores without it.
        progress: show a bar on the terminal.
        boundary: add ``boundary_iou``, see `effseg.metrics.BoundaryIoU`.

    Returns:
        What ``SegmentationMetrics.compute`` returns, and ``images``, the number of pairs (int).

    Raises:
        InputError: a folder, split file, true mask or prediction that is missing, empty or
            unreadable, has another size or colour channels, or holds a value outside 0 … K-1; the
            message names the file. True masks in which every pixel is ignored.
    """
    pred_dir, gt_dir = Path(pred_dir), Path(gt_dir)
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected at least 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}: expected at least 1")
    truths, predictions = _list_masks(gt_dir), _list_masks(pred_dir)
    ids = _list_ids(gt_dir, truths, None if split is None else Path(split))
    _require(gt_dir, truths, ids, "true mask")
    _require(pred_dir, predictions, ids, "prediction")

    def count(name: str) -> tuple[Counts, Counts]:
        pair = pred_dir / predictions[name], gt_dir / truths[name]
        return _count(*pair, num_classes, ignore_index, boundary)

    counts = np.zeros((num_classes, num_classes), np.int64)
    regions = np.zeros((2, num_classes), np.int64)
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        results = pool.map(count, ids)
        for confusion, boundaries in track(results, "scoring", len(ids), disable=not progress):
            counts += confusion
            regions += boundaries
    finally:
        pool.shutdown(cancel_futures=True)
    if not counts.any():
        raise InputError(f"{gt_dir}: no pixel to count, every one is {ignore_index} (ignored)")
    result: dict[str, Any] = {**scores(torch.from_numpy(counts), ignore_index), "images": len(ids)}
    if boundary:
        result["boundary_iou"] = boundary_scores(torch.from_numpy(regions), ignore_index)[
            "boundary_iou"
        ]
    return result


def _list_masks(folder: Path) -> dict[str, str]:
    """Return the names of a folder's PNG files by their stems, without the hidden ones."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    masks: dict[str, str] = {}
    for name in os.listdir(folder):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".png" and not name.startswith("."):
            if stem in masks:
                raise InputError(f"{folder}: holds both {masks[stem]} and {name}, expected one")
            masks[stem] = name
    return masks


def _list_ids(gt_dir: Path, truths: Mapping[str, str], split: Path | None) -> list[str]:
    """Return the stems to score: a split file's lines, or all true masks'."""
    if split is None:
        if not truths:
            raise InputError(f"{gt_dir}: holds no .png file")
        return sorted(truths)
    ids = read_lines(split)
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{split}: holds {twice} twice: expected every id once")
    return ids


def _require(folder: Path, masks: Mapping[str, str], ids: list[str], role: str) -> None:
    missing = [name for name in ids if name not in masks]
    if missing:
        rest = f" (and {len(missing) - 1} more of {len(ids)})" if len(missing) > 1 else ""
        raise InputError(f"{folder / missing[0]}.png: {role} is missing{rest}")


def _count(
    pred_path: Path, gt_path: Path, num_classes: int, ignore_index: int | None, boundary: bool
) -> tuple[Counts, Counts]:
    """Return the confusion matrix of a pair, (K, K), and its boundary counts, (2, K) or zeros."""
    labels, target = read_indices(pred_path), read_indices(gt_path)
    if labels.shape != target.shape:
        (height, width), (rows, columns) = labels.shape, target.shape
        raise InputError(
            f"{pred_path}: is {width} x {height}: expected {columns} x {rows} as {gt_path}"
        )
    if num_classes <= 256 and labels.dtype == target.dtype == np.uint8:
        flat = labels.reshape(-1).view(np.uint8), target.reshape(-1).view(np.uint8)
        counts = count_bytes(*flat, num_classes, ignore_index)
    else:
        counts = count_pairs(*_tensors(labels, target), num_classes, ignore_index).numpy()
    if counts.sum() + count_ignored(target, ignore_index) != target.size:
        unknown = largest_unknown(*_tensors(labels, target), num_classes, ignore_index)
        path = pred_path if int(unknown[0]) == ALL_KNOWN else gt_path
        raise InputError(f"{path}: {describe_unknown(unknown, num_classes, ignore_index)}")
    regions = np.zeros((2, num_classes), np.int64)
    if boundary:
        pair = _tensors(labels, target)
        regions = boundary_counts(*pair, num_classes, ignore_index).numpy()
    return counts, regions


def _tensors(
    labels: npt.NDArray[np.integer[Any]], target: npt.NDArray[np.integer[Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 copies: torch takes no read-only arrays and knows little of uint16."""
    return torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(target.astype(np.int64))
