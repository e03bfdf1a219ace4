"""Score a folder of predicted masks against a folder of true masks."""

# K classes, H W pixels

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from effseg.data.classes import Classes
from effseg.data.files import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    is_white_class,
    read_indices,
    read_lines,
    white_as_class,
)
from effseg.data.listing import nfc, walk_named
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError, note
from effseg.metrics.boundary import boundary_counts, boundary_scores
from effseg.metrics.confusion import confusion_counts, scores

_PART = 16
"""Most masks that a thread counts at a time; one by one, threads wait for each other more often."""


def score_folders(
    pred_dir: str | Path,
    gt_dir: str | Path,
    num_classes: int = 21,
    ignore_index: int | None = IGNORE_INDEX,
    split: str | Path | None = None,
    workers: int | None = None,
    progress: bool = False,
    boundary: bool = False,
    binary: bool | None = None,
    classes: Classes | None = None,
) -> dict[str, Any]:
    """Score predicted masks, one PNG per image, by dataset-level mIoU.

    Every `ID.png` of `gt_dir`, or of the split, is compared with `pred_dir/ID.png`, sub-folders
    included. Both contain class indices, as palette or greyscale images, or with `classes` their
    colours, read as for training. The suffix may be `.PNG`,
    `.tif` or `.bmp`; hidden and other files are ignored, and predictions without a true mask are
    reported on stderr.

    Args:
        pred_dir: folder of predictions.
        gt_dir: folder of true masks.
        num_classes: K, background included.
        ignore_index: true label of ignored pixels, or None.
        split: text file with one id (the path in `gt_dir` without suffix) per line, see
            `effseg.data.files.read_lines`; None: all of `gt_dir`.
        workers: number of threads; None: the number of cores.
        progress: show a progress bar.
        boundary: add `boundary_iou`, see `effseg.metrics.BoundaryIoU`.
        binary: with two classes, masks contain 0 and 255, and 255 is the second class; False: it is
            ignored. None: it is the second class if no true mask contains a 1, likewise for the
            predictions; this is reported on stderr.
        classes: the class list, by whose colours RGB masks and palettes are read, see
            `effseg.data.files.read_mask`; None: by number only.

    Returns:
        The dict of `SegmentationMetrics.compute`, and `images`, the number of pairs (int).

    Raises:
        InputError: a folder, split file, true mask or prediction that is missing, empty or
            unreadable, differs in size, has colour channels (with `classes`: a colour of no
            class), or contains a value outside 0 … K-1; the message names the file. True masks in
            which every pixel is ignored. A class list that has not `num_classes` classes.
    """
    pred_dir, gt_dir = Path(pred_dir), Path(gt_dir)
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected at least 1")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}: expected at least 1")
    if classes is not None and len(classes) != num_classes:
        raise InputError(f"num_classes is {num_classes}: expected {len(classes)}, as the classes")
    two = num_classes == 2 and ignore_index == IGNORE_INDEX
    if binary and not two:
        raise InputError(
            f"binary with num_classes={num_classes} and ignore_index={ignore_index}: "
            f"expected 2 and {IGNORE_INDEX}"
        )
    truths, predictions = _list_masks(gt_dir, "true masks"), _list_masks(pred_dir)
    ids = _list_ids(gt_dir, truths, None if split is None else Path(split))
    roles = (gt_dir, truths, "true mask"), (pred_dir, predictions, "prediction")
    for folder, masks, role in roles:
        missing = [name for name in ids if name not in masks]
        if missing:
            rest = f" (and {len(missing) - 1} more of {len(ids)})" if len(missing) > 1 else ""
            raise InputError(f"{folder / missing[0]}.png: {role} is missing{rest}")
    unpaired = sorted(predictions.keys() - truths.keys())
    if unpaired:
        first, number = predictions[unpaired[0]], f"{len(unpaired)} of {len(predictions)}"
        note(f"{first}: no true mask in {gt_dir}, not scored ({number} predictions)")
    white_truth = two and binary is not False
    if white_truth and binary is None:
        white_truth = _is_binary(gt_dir, [truths[name] for name in ids], classes)
    # The predictions may still be 0 and 1.
    paths = [predictions[name] for name in ids]
    white_prediction = white_truth and _is_binary(pred_dir, paths, classes)

    def count(part: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        regions = torch.zeros(2, num_classes, dtype=torch.int64)
        for name in part:
            pred_path, gt_path = predictions[name], truths[name]
            labels = _read(pred_path, classes, white_prediction)
            target = _read(gt_path, classes, white_truth)
            if labels.shape != target.shape:
                size, expected = (f"{w} x {h}" for h, w in (labels.shape, target.shape))
                raise InputError(f"{pred_path}: is {size}: expected {expected} as {gt_path}")
            names = f"{gt_path}: target", f"{pred_path}: prediction"
            counts += confusion_counts(labels, target, num_classes, ignore_index, names)
            if boundary:
                regions += boundary_counts(labels, target, num_classes, ignore_index)
        return counts, regions

    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    regions = torch.zeros(2, num_classes, dtype=torch.int64)
    threads = workers or os.cpu_count() or 1
    size = min(_PART, max(1, len(ids) // (4 * threads)))
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # The decoder's memory is read-only, and nothing writes to it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        results = pool.map(count, parts)
        for confusion, boundaries in track(results, "scoring", len(parts), disable=not progress):
            counts += confusion
            regions += boundaries
    if not counts.any():
        raise InputError(f"{gt_dir}: no pixel to count, every one is {ignore_index} (ignored)")
    result: dict[str, Any] = {**scores(counts, ignore_index), "images": len(ids)}
    if boundary:
        result["boundary_iou"] = boundary_scores(regions, ignore_index)["boundary_iou"]
    return result


def _list_masks(folder: Path, kind: str = "") -> dict[str, Path]:
    """Return a folder's masks by relative path without suffix; report images that are no masks."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    masks: dict[str, Path] = {}
    other_images = []
    for name, path in walk_named(folder):
        if path.suffix.lower() in MASK_SUFFIXES:
            if name in masks:
                both = f"{masks[name].name} and {path.name}"
                raise InputError(f"{folder}: contains both {both}, expected one")
            masks[name] = path
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            other_images.append(path)
    if other_images and kind:
        count = f"{len(other_images)} files beside {len(masks)} {kind}"
        note(f"{other_images[0]}: no mask, not scored ({count})")
    return masks


def _is_binary(folder: Path, paths: list[Path], classes: Classes | None) -> bool:
    """Return whether 255 is class 1 in a folder's masks: some contain a 255, none a 1."""
    binary = is_white_class(paths, classes)
    if binary:
        note(f"{folder}: masks contain 0 and 255 but no 1, so 255 is class 1")
    return binary


def _read(path: Path, classes: Classes | None, binary: bool) -> torch.Tensor:
    values = read_indices(path, classes, IGNORE_INDEX if binary else 1)
    if binary:
        values = white_as_class(path, values)
    # Not copied, for speed; torch hardly supports uint16.
    return torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.int64))


def _list_ids(gt_dir: Path, truths: Mapping[str, Path], split: Path | None) -> list[str]:
    """Return the ids to score: the lines of a split file, or all true masks."""
    if split is None:
        if not truths:
            raise InputError(f"{gt_dir}: contains no .png file")
        return sorted(truths)
    ids = [nfc(name) for name in read_lines(split)]
    if len(set(ids)) != len(ids):
        duplicate = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{split}: contains {duplicate} twice: expected every id once")
    return ids
