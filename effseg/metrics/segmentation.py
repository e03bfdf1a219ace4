"""Dataset-level mIoU and its relatives, from one int64 confusion matrix."""

# B images, K classes, H W pixels

from typing import Any

import torch
from torchmetrics import Metric

from effseg.data.samples import IGNORE_INDEX
from effseg.errors import InputError
from effseg.metrics.tally import tally

NOTHING_UNKNOWN = torch.iinfo(torch.int64).min


def as_labels(
    preds: torch.Tensor, target: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predicted and true labels of one shape on one device.

    Args:
        preds: (B, K, H, W) floating-point logits, or (B, H, W) or (H, W) integer labels.
        target: (B, H, W) or (H, W) integer labels.
        num_classes: K.

    Raises:
        InputError: the shapes do not fit each other, or ``target`` is not made of integers.
    """
    if target.is_floating_point() or target.is_complex():
        raise InputError(f"target has dtype {target.dtype}: expected an integer dtype")
    shapes = f"preds {tuple(preds.shape)} and target {tuple(target.shape)}"
    if preds.is_floating_point():
        if preds.ndim != 4 or preds.shape[1] != num_classes:
            raise InputError(f"{shapes}: expected logits of shape (B, {num_classes}, H, W)")
        if (preds.shape[0], *preds.shape[2:]) != tuple(target.shape):
            raise InputError(f"{shapes}: expected (B, K, H, W) and (B, H, W)")
        preds = preds.argmax(dim=1)
    if preds.shape != target.shape or target.ndim not in (2, 3):
        raise InputError(f"{shapes}: expected the same (B, H, W) or (H, W) twice")
    return preds, target.to(preds.device)


def find_unknown(
    labels: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int | None
) -> torch.Tensor:
    """Return the largest value outside 0 … K-1 among the counted pixels: (2,) truth, prediction.

    Where there is none it is ``NOTHING_UNKNOWN``, the least int64. Nothing waits for the device.
    """
    truth, predicted = target.long(), labels.long()
    counted = torch.ones_like(truth, dtype=torch.bool)
    if ignore_index is not None:
        counted = truth != ignore_index
    found = [
        values.masked_fill(~counted | ((values >= 0) & (values < num_classes)), NOTHING_UNKNOWN)
        for values in (truth, predicted)
    ]
    return torch.stack([values.amax() for values in found])


def describe_unknown(unknown: torch.Tensor, num_classes: int, ignore_index: int | None) -> str:
    """Return one line about what ``find_unknown`` found, or an empty string."""
    truth, predicted = (int(value) for value in unknown.tolist())
    expected = f"expected 0 to {num_classes - 1}"
    if truth != NOTHING_UNKNOWN:
        ignored = "" if ignore_index is None else f" or {ignore_index} (ignored)"
        return f"target holds the value {truth}: {expected}{ignored}"
    if predicted != NOTHING_UNKNOWN:
        return f"prediction holds the value {predicted}: {expected}"
    return ""


def confusion_counts(
    preds: torch.Tensor,
    target: torch.Tensor,
    num_classes: int = 21,
    ignore_index: int | None = IGNORE_INDEX,
) -> torch.Tensor:
    """Count pixels by true and predicted class.

    Args:
        preds: (B, K, H, W) floating-point logits, or (B, H, W) or (H, W) labels of any integer
            dtype.
        target: (B, H, W) or (H, W) labels of any integer dtype.
        num_classes: K.
        ignore_index: true label of the pixels that count nowhere; inside or outside 0 … K-1.

    Returns:
        (K, K) int64, rows truth, columns prediction, on the device of ``preds``.

    Raises:
        InputError: shapes that do not fit, or a counted value outside 0 … K-1.
    """
    labels, target = as_labels(preds, target, num_classes)
    table = tally(labels, target, num_classes, ignore_index)
    if bool(table[-1].any() | table[:, -1].any()):
        unknown = find_unknown(labels, target, num_classes, ignore_index)
        raise InputError(describe_unknown(unknown, num_classes, ignore_index))
    return table[:-1, :-1]


def scores(confusion: torch.Tensor, ignore_index: int | None = None) -> dict[str, torch.Tensor]:
    """Turn a confusion matrix into scores, in float64 (Long et al. 2015, section 5).

    Args:
        confusion: (K, K) counts, rows truth, columns prediction.
        ignore_index: where it is one of the classes, that class has no IoU of its own.

    Returns:
        ``miou`` mean IoU over classes that are in the truth or in the prediction; ``iou`` (K,),
        nan for the other classes; ``pixel_accuracy``; ``mean_accuracy`` over the classes in the
        truth; ``fwiou`` IoU weighted by the class's share of the truth; ``confusion`` (K, K) int64.
        All in 0 … 1, and nan where no pixel counts. On the matrix's device (on the CPU for MPS,
        which has no float64).
    """
    if confusion.device.type == "mps":
        confusion = confusion.cpu()
    counts = confusion.to(torch.float64)
    correct, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = correct / (truth + predicted - correct)
    if ignore_index is not None and 0 <= ignore_index < len(counts):
        iou[ignore_index] = torch.nan
    share = truth / truth.sum()
    return {
        "miou": iou.nanmean(),
        "iou": iou,
        "pixel_accuracy": correct.sum() / truth.sum(),
        "mean_accuracy": (correct / truth).nanmean(),
        "fwiou": torch.where(truth == 0, share, share * iou).sum(),
        "confusion": confusion,
    }


class SegmentationMetrics(Metric):
    """Dataset-level mIoU, IoU per class, accuracies and the confusion matrix.

    One int64 matrix is summed over all updates and processes, and divided once, in float64: never a
    mean over images or batches. A class absent from truth and prediction has IoU nan and is left
    out of the mean; one that is predicted but absent from the truth has IoU 0 and counts. An
    ``ignore_index`` inside 0 … K-1 leaves that class out of the mean too, as torchmetrics does.

    ``update(preds, target)`` and ``compute()`` take and return what `confusion_counts` and
    `scores` describe. A value outside 0 … K-1 raises `InputError` in ``update`` on the CPU, and in
    ``compute`` on other devices, where looking at each update would make the device wait.

    Args:
        num_classes: K, background included.
        ignore_index: true label of the pixels that count nowhere, or None.

    Raises:
        InputError: ``num_classes`` is less than 1.

    Example:
        >>> import torch
        >>> from effseg.metrics import SegmentationMetrics
        >>> metrics = SegmentationMetrics(num_classes=3, ignore_index=255)
        >>> metrics.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
        >>> result = metrics.compute()
        >>> result["iou"]
        tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
        >>> round(float(result["miou"]), 2), round(float(result["pixel_accuracy"]), 2)
        (0.5, 0.67)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    table: torch.Tensor
    unknown: torch.Tensor

    def __init__(
        self,
        num_classes: int = 21,
        ignore_index: int | None = IGNORE_INDEX,
        **kwargs: Any,
    ) -> None:
        """Start from zero counts; ``kwargs`` are those of ``torchmetrics.Metric``."""
        super().__init__(**kwargs)
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}: expected at least 1")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        size = num_classes + 1
        self.add_state("table", torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum")
        nothing = torch.full((2,), NOTHING_UNKNOWN, dtype=torch.int64)
        self.add_state("unknown", nothing, dist_reduce_fx="max")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add one image or one batch; see `confusion_counts`."""
        if preds.device.type == "cpu":
            counts = confusion_counts(preds, target, self.num_classes, self.ignore_index)
            self.table[:-1, :-1] += counts.to(self.table.device)
        elif target.numel():
            labels, target = as_labels(preds, target, self.num_classes)
            options = (self.num_classes, self.ignore_index)
            self.table += tally(labels, target, *options).to(self.table.device)
            unknown = find_unknown(labels, target, *options).to(self.unknown.device)
            self.unknown = torch.maximum(self.unknown, unknown)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the scores of everything since the last reset; see `scores`."""
        problem = describe_unknown(self.unknown, self.num_classes, self.ignore_index)
        if problem:
            raise InputError(problem)
        return scores(self.table[:-1, :-1], self.ignore_index)
