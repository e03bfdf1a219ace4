"""Score a folder of predicted masks against a folder of true masks."""

# K classes, H W pixels

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from effseg.data.files import read_indices, read_lines
from effseg.data.samples import IGNORE_INDEX
from effseg.errors import InputError
from effseg.metrics.boundary import boundary_counts, boundary_scores
from effseg.metrics.segmentation import (
    NOTHING_UNKNOWN,
    describe_unknown,
    find_unknown,
    scores,
)
from effseg.metrics.tally import tally, tally_bytes

Indices = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]
_PAIRS_A_JOB = 8


def _list_ids(gt_dir: Path, split: Path | None) -> list[str]:
    """Return the stems to score: a split file's lines, or the truth's files."""
    if split is None:
        ids = sorted(path.stem for path in gt_dir.iterdir() if path.suffix == ".png")
        if not ids:
            raise InputError(f"{gt_dir}: holds no .png file")
        return ids
    ids = read_lines(split)
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{split}: holds {twice} twice: expected every id once")
    return ids


def _require_files(folder: Path, ids: list[str], role: str) -> None:
    missing = [name for name in ids if not (folder / f"{name}.png").is_file()]
    if missing:
        rest = f" (and {len(missing) - 1} more of {len(ids)})" if len(missing) > 1 else ""
        raise InputError(f"{folder / missing[0]}.png: {role} is missing{rest}")


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
    class indices, as palette or grey. Other files in ``pred_dir`` are left alone.

    Args:
        pred_dir: folder of predictions.
        gt_dir: folder of true masks.
        num_classes: K, background included.
        ignore_index: true value of the pixels that count nowhere, or None.
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
            message names the file.
    """
    pred_dir, gt_dir = Path(pred_dir), Path(gt_dir)
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected at least 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}: expected at least 1")
    for folder in (pred_dir, gt_dir):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    ids = _list_ids(gt_dir, None if split is None else Path(split))
    _require_files(gt_dir, ids, "true mask")
    _require_files(pred_dir, ids, "prediction")

    def count(names: list[str]) -> tuple[Counts, Counts]:
        pairs = [Pair(pred_dir / f"{name}.png", gt_dir / f"{name}.png") for name in names]
        return _count(pairs, num_classes, ignore_index, boundary)

    table = np.zeros((num_classes, num_classes), np.int64)
    regions = np.zeros((2, num_classes), np.int64)
    # A few pairs a job: they are counted in one go, and handing a job over takes its time.
    jobs = [ids[i : i + _PAIRS_A_JOB] for i in range(0, len(ids), _PAIRS_A_JOB)]
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        futures = [pool.submit(count, names) for names in jobs]
        done = as_completed(futures)
        for future in track(done, "scoring", total=len(jobs), disable=not progress):
            confusion, boundaries = future.result()
            table += confusion
            regions += boundaries
    finally:
        pool.shutdown(cancel_futures=True)
    result: dict[str, Any] = {
        **scores(torch.from_numpy(table), ignore_index),
        "images": len(ids),
    }
    if boundary:
        result["boundary_iou"] = boundary_scores(torch.from_numpy(regions))["boundary_iou"]
    return result


class Pair:
    """A decoded prediction and its truth, of one size."""

    def __init__(self, pred_path: Path, gt_path: Path) -> None:
        """Decode both; raises InputError."""
        self.pred_path, self.gt_path = pred_path, gt_path
        self.labels, self.target = read_indices(pred_path), read_indices(gt_path)
        if self.labels.shape != self.target.shape:
            (height, width), (rows, columns) = self.labels.shape, self.target.shape
            raise InputError(
                f"{pred_path}: is {width} x {height}: expected {columns} x {rows} as {gt_path}"
            )

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies as tensors."""
        return _tensor(self.labels), _tensor(self.target)


def _count(
    pairs: list[Pair], num_classes: int, ignore_index: int | None, boundary: bool
) -> tuple[Counts, Counts]:
    """Return the confusion matrix of some pairs, (K, K), and their boundary counts, (2, K)."""
    # One image may be of more bits than the others: they are put side by side in the widest type.
    labels = np.concatenate([pair.labels for pair in pairs], axis=None)
    target = np.concatenate([pair.target for pair in pairs], axis=None)
    table = _tally(labels, target, num_classes, ignore_index)
    if table[-1].any() or table[:, -1].any():
        _refuse_unknown(pairs, num_classes, ignore_index)
    regions = np.zeros((2, num_classes), np.int64)
    for pair in pairs if boundary else []:
        regions += boundary_counts(*pair.tensors(), num_classes, ignore_index).numpy()
    return table[:-1, :-1], regions


def _tally(labels: Indices, target: Indices, num_classes: int, ignore_index: int | None) -> Counts:
    if num_classes <= 256 and labels.dtype == target.dtype == np.uint8:
        return tally_bytes(labels.view(np.uint8), target.view(np.uint8), num_classes, ignore_index)
    return tally(_tensor(labels), _tensor(target), num_classes, ignore_index).numpy()


def _tensor(values: Indices) -> torch.Tensor:
    """Copy an array: to int64 unless it is uint8, as torch knows little of uint16."""
    copy = values.copy() if values.dtype == np.uint8 else values.astype(np.int64)
    return torch.from_numpy(copy)


def _refuse_unknown(pairs: list[Pair], num_classes: int, ignore_index: int | None) -> None:
    """Name the first file that holds a value that no class has."""
    for pair in pairs:
        unknown = find_unknown(*pair.tensors(), num_classes, ignore_index)
        problem = describe_unknown(unknown, num_classes, ignore_index)
        if problem:
            path = pair.pred_path if int(unknown[0]) == NOTHING_UNKNOWN else pair.gt_path
            raise InputError(f"{path}: {problem}")
