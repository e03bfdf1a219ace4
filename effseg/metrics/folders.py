"""Score a folder of predicted masks against a folder of true masks."""

# K classes, H W pixels

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    count_pairs,
    describe_unknown,
    largest_unknown,
    scores,
)

_PAIRS_PER_JOB = 8  # counted by one histogram: its 65,536 bins cost as much as a small mask


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

    def count(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [Pair(predictions[name], truths[name]) for name in names]
        return _count(pairs, num_classes, ignore_index, boundary)

    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    regions = torch.zeros(2, num_classes, dtype=torch.int64)
    jobs = [ids[i : i + _PAIRS_PER_JOB] for i in range(0, len(ids), _PAIRS_PER_JOB)]
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
    if not table.any():
        raise InputError(f"{gt_dir}: no pixel to count, every one is {ignore_index} (ignored)")
    result: dict[str, Any] = {**scores(table, ignore_index), "images": len(ids)}
    if boundary:
        result["boundary_iou"] = boundary_scores(regions, ignore_index)["boundary_iou"]
    return result


def _list_masks(folder: Path) -> dict[str, Path]:
    """Return the PNG files of a folder by their stems, without the hidden ones."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    masks: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".png" and not path.name.startswith("."):
            if path.stem in masks:
                raise InputError(f"{path}: {masks[path.stem].name} has the same name")
            masks[path.stem] = path
    return masks


def _list_ids(gt_dir: Path, truths: Mapping[str, Path], split: Path | None) -> list[str]:
    """Return the stems to score: a split file's lines, or all true masks'."""
    if split is None:
        if not truths:
            raise InputError(f"{gt_dir}: holds no .png file")
        return list(truths)
    ids = read_lines(split)
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{split}: holds {twice} twice: expected every id once")
    return ids


def _require(folder: Path, masks: Mapping[str, Path], ids: list[str], role: str) -> None:
    missing = [name for name in ids if name not in masks]
    if missing:
        rest = f" (and {len(missing) - 1} more of {len(ids)})" if len(missing) > 1 else ""
        raise InputError(f"{folder / missing[0]}.png: {role} is missing{rest}")


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
        """Return labels and target, (H, W) each."""
        return _tensor(self.labels.copy()), _tensor(self.target.copy())


def _tensor(values: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
    """Return a writable array as a tensor, wider than uint8 as int64: torch knows no uint16."""
    return torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.int64))


def _count(
    pairs: list[Pair], num_classes: int, ignore_index: int | None, boundary: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the confusion matrix of some pairs, (K, K), and their boundary counts, (2, K)."""
    # One mask may be of more bits than the others: concatenate takes the wider type.
    labels = _tensor(np.concatenate([pair.labels for pair in pairs], axis=None))
    target = _tensor(np.concatenate([pair.target for pair in pairs], axis=None))
    table = count_pairs(labels, target, num_classes, ignore_index)
    if table[-1].any() or table[:, -1].any():
        _refuse_unknown(pairs, num_classes, ignore_index)
    regions = torch.zeros(2, num_classes, dtype=torch.int64)
    for pair in pairs if boundary else []:
        regions += boundary_counts(*pair.tensors(), num_classes, ignore_index)
    return table[:-1, :-1], regions


def _refuse_unknown(pairs: list[Pair], num_classes: int, ignore_index: int | None) -> None:
    """Name the first file that holds a value that no class has."""
    for pair in pairs:
        unknown = largest_unknown(*pair.tensors(), num_classes, ignore_index)
        problem = describe_unknown(unknown, num_classes, ignore_index)
        if problem:
            path = pair.pred_path if int(unknown[0]) == ALL_KNOWN else pair.gt_path
            raise InputError(f"{path}: {problem}")
