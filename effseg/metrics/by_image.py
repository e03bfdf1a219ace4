"""Scores of single images, to find the worst ones."""

# H W pixels, N boxes, M objects, K classes

from collections.abc import Mapping

import torch
from torchvision.ops import box_iou

from effseg.data.sample import IGNORE_INDEX
from effseg.metrics.confusion import count_pairs, scores

Boxes = Mapping[str, torch.Tensor]


def image_iou(prediction: torch.Tensor, truth: torch.Tensor, num_classes: int) -> float:
    """Return the mean IoU over the classes in an image's truth or prediction; nan if none.

    Both are (H, W) uint8 labels; 255 in the truth is ignored.
    """
    counts = count_pairs(prediction, truth, num_classes, IGNORE_INDEX)
    return float(scores(counts)["miou"])


def match_boxes(
    result: Boxes, truth: Boxes, score_threshold: float
) -> list[tuple[int | None, int | None]]:
    """Match an image's detections to its objects.

    In descending order of score, each detection is matched to the unmatched object of any class
    with the highest IoU, 0.5 or more. Crowds and difficult objects are ignored, and so are
    unmatched detections that overlap one, and those with a lower score than the threshold.

    `result` has `boxes` (N, 4), `scores` (N,) and `labels` (N,) 0 … K-1; `truth` has `boxes`
    (M, 4), `labels` (M,) and, where there are any, `crowd` (M,) and `difficult` (M,); all are on
    the CPU. Returns pairs (object, detection) of indices into them; the object is None for a false
    positive, the detection is None for a missed object.
    """
    none = torch.zeros(len(truth["labels"]), dtype=torch.bool)
    left_out = truth.get("crowd", none) | truth.get("difficult", none)
    free = set((~left_out).nonzero().flatten().tolist())
    overlaps = box_iou(result["boxes"], truth["boxes"].reshape(-1, 4)).tolist()
    pairs: list[tuple[int | None, int | None]] = []
    for i in result["scores"].argsort(descending=True, stable=True).tolist():
        if result["scores"][i] < score_threshold:
            break
        candidates = {j for j, overlap in enumerate(overlaps[i]) if overlap >= 0.5}
        best = max(candidates & free, key=overlaps[i].__getitem__, default=None)
        if best is not None:
            free.remove(best)
        elif any(left_out[j] for j in candidates):
            continue
        pairs.append((best, i))
    return pairs + [(j, None) for j in sorted(free)]


def box_confusion(
    result: Boxes, truth: Boxes, num_classes: int, score_threshold: float
) -> torch.Tensor:
    """Return the confusion matrix of `match_boxes` (same arguments); K excludes background.

    It is (K + 1, K + 1) int64, rows truth, columns prediction; row 0 counts false positives, column
    0 missed objects.
    """
    counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for j, i in match_boxes(result, truth, score_threshold):
        true = 0 if j is None else int(truth["labels"][j]) + 1
        counts[true, 0 if i is None else int(result["labels"][i]) + 1] += 1
    return counts


def image_f1(confusion: torch.Tensor) -> float:
    """Return F1 of `box_confusion`, 2 correct / (detections + objects); nan if there are none."""
    correct = int(confusion.diagonal().sum())
    total = int(confusion[:, 1:].sum() + confusion[1:].sum())
    return 2 * correct / total if total else float("nan")
