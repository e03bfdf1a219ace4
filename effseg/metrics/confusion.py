"""Dataset-level mIoU and related scores, from one int64 confusion matrix."""

# B images, K classes, H W pixels

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError

NAMES = ("target", "prediction")
_ALL_KNOWN = torch.iinfo(torch.int64).min
_NOT_FINITE = "preds contains nan or infinity: expected finite logits"
_HISTOGRAM_PIXELS = 1 << 24  # calcHist counts in float32, which is exact up to 2**24


class DatasetMetric(Metric):
    """A metric that sums counts over a dataset and divides once; `compute` returns a dict.

    Subclasses list the non-scalar values in `dimensions`: torchmetrics squeezes tensors of one
    element, so with one class a vector would lose its dimension.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    dimensions: ClassVar[dict[str, int]] = {}

    def __init__(self, num_classes: int, *options: float | None, **kwargs: Any) -> None:
        """Check the number of classes; `options` are what else the state depends on.

        A MetricCollection shares one state between metrics whose states are equal after the first
        update, so the options are a state too.
        """
        super().__init__(**kwargs)
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}: expected at least 1")
        self.num_classes = num_classes
        values = [math.nan if option is None else float(option) for option in options]
        self.add_state("options", torch.tensor([num_classes, *values]), dist_reduce_fx="max")

    def scalars(self) -> dict[str, torch.Tensor]:
        """Return the 0-dim values of `compute()`, as Lightning's `log_dict` takes them."""
        return {k: v for k, v in self.compute().items() if k not in self.dimensions}

    # Private in torchmetrics; an option that turns its squeezing off would replace this.
    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        squeezed = super()._wrap_compute(compute)

        @wraps(compute)
        def with_dimensions(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            values = squeezed(*args, **kwargs)
            return {
                k: v.reshape((1,) * self.dimensions.get(k, 0)) if v.numel() == 1 else v
                for k, v in values.items()
            }

        return with_dimensions


def as_labels(
    preds: torch.Tensor, target: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predicted and true labels of one shape on one device; see `confusion_counts`."""
    if target.is_floating_point() or target.is_complex():
        raise InputError(f"target has dtype {target.dtype}: expected an integer dtype")
    shapes = f"preds {tuple(preds.shape)} and target {tuple(target.shape)}"
    if preds.is_floating_point():
        size = preds.shape[:1] + preds.shape[2:]
        if preds.ndim != 4 or preds.shape[1] != num_classes or size != target.shape:
            raise InputError(f"{shapes}: expected (B, {num_classes}, H, W) and (B, H, W)")
        preds = preds.argmax(dim=1)
    if preds.shape != target.shape or target.ndim not in (2, 3):
        raise InputError(f"{shapes}: expected the same (B, H, W) or (H, W) twice")
    return preds, target.to(preds.device)


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Return whether all values are finite, as a 0-dim bool tensor, without synchronising."""
    if values.numel() == 0 or not values.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=values.device)
    low, high = values.aminmax()  # nan wins in both
    return low.isfinite() & high.isfinite()


def require_finite(logits: torch.Tensor) -> None:
    """Raise InputError if logits contain nan or infinity; integers are always finite."""
    if not all_finite(logits):
        raise InputError(_NOT_FINITE)


def count_pairs(
    labels: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int | None
) -> torch.Tensor:
    """Count label pairs of any integer dtype, without ignored pixels and unknown values.

    Returns:
        (K, K) int64, rows truth, columns prediction: on the GPU for CUDA, else on the CPU.
    """
    if labels.is_cuda:
        return _count_wide(labels, target, num_classes, ignore_index)
    return _count_on_cpu(labels, target, num_classes, ignore_index)[0]


def _count_on_cpu(
    labels: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int | None
) -> tuple[torch.Tensor, int]:
    """Return what `count_pairs` does, and the number of ignored pixels."""
    labels, target = labels.cpu(), target.cpu()
    pair = [values.numpy().reshape(-1) for values in (target, labels)]
    if num_classes > 256 or not all(_fits_bytes(values) for values in pair):
        counts = _count_wide(labels, target, num_classes, ignore_index)
        return counts, _count_ignored(pair[0], ignore_index)
    # OpenCV's histogram uses one core; torch's threads would compete with the loader's processes.
    flat = [values.astype(np.uint8, copy=False) for values in pair]
    table = np.zeros((256, num_classes), np.int64)
    bins, ranges = [256, num_classes], [0, 256, 0, num_classes]
    for start in range(0, target.numel(), _HISTOGRAM_PIXELS):
        part = [values[start : start + _HISTOGRAM_PIXELS] for values in flat]
        table += cv2.calcHist(part, [0, 1], None, bins, ranges).astype(np.int64)
    ignored = 0
    if ignore_index is not None and 0 <= ignore_index < 256:
        if table.sum() < target.numel():  # it lacks the pixels whose prediction is no class
            ignored = _count_ignored(flat[0], ignore_index)
        else:
            ignored = int(table[ignore_index].sum())
        table[ignore_index] = 0
    return torch.from_numpy(table[:num_classes]), ignored


def _count_ignored(target: npt.NDArray[Any], ignore_index: int | None) -> int:
    # NumPy compares the unsigned dtypes too, which torch hardly supports.
    return 0 if ignore_index is None else int(np.count_nonzero(target == ignore_index))


def _fits_bytes(values: npt.NDArray[Any]) -> bool:
    return values.dtype == np.uint8 or not values.size or 0 <= values.min() <= values.max() <= 255


def _count_wide(
    labels: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int | None
) -> torch.Tensor:
    # Any integers on any device; unlike bincount, without synchronising.
    truth, predicted = target.reshape(-1).long(), labels.reshape(-1).long()
    left_out = (truth < 0) | (truth >= num_classes) | (predicted < 0) | (predicted >= num_classes)
    if ignore_index is not None:
        left_out |= truth == ignore_index
    last = num_classes * num_classes  # a bin that is discarded
    codes = (truth * num_classes + predicted).masked_fill(left_out, last)
    counts = codes.new_zeros(last + 1).scatter_add_(0, codes, torch.ones_like(codes))
    return counts[:-1].reshape(num_classes, num_classes)


def _largest_unknown(
    labels: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int | None
) -> torch.Tensor:
    """Return the largest counted value outside 0 … K-1, (2,): of the truth, of the prediction.

    It is `_ALL_KNOWN` where all are classes. Does not synchronise.
    """
    truth, predicted = target.long(), labels.long()
    counted = torch.ones_like(truth, dtype=torch.bool)
    if ignore_index is not None:
        counted = truth != ignore_index
    unknown = [
        values.masked_fill(~counted | ((values >= 0) & (values < num_classes)), _ALL_KNOWN)
        for values in (truth, predicted)
    ]
    return torch.stack([values.amax() for values in unknown])


def _refuse_unknown(
    unknown: torch.Tensor,
    num_classes: int,
    ignore_index: int | None,
    names: tuple[str, str] = NAMES,
) -> None:
    """Raise InputError about the result of `_largest_unknown`, unless all values are classes."""
    ignored = "" if ignore_index is None else f" or {ignore_index} (ignored)"
    for name, value, also in zip(names, unknown.tolist(), (ignored, ""), strict=True):
        if value != _ALL_KNOWN:
            raise InputError(
                f"{name} contains the value {value}: expected 0 to {num_classes - 1}{also}"
            )


def confusion_counts(
    preds: torch.Tensor,
    target: torch.Tensor,
    num_classes: int = 21,
    ignore_index: int | None = IGNORE_INDEX,
    names: tuple[str, str] = NAMES,
) -> torch.Tensor:
    """Count pixels by true and predicted class.

    Args:
        preds: (B, K, H, W) floating-point logits, or (B, H, W) or (H, W) labels of any integer
            dtype.
        target: (B, H, W) or (H, W) labels of any integer dtype.
        num_classes: K.
        ignore_index: true label of ignored pixels; inside or outside 0 … K-1.
        names: what to call the truth and the prediction in an error about a value.

    Returns:
        (K, K) int64, rows truth, columns prediction.

    Raises:
        InputError: shapes that do not match, logits with nan or infinity, or a counted value
            outside 0 … K-1.
    """
    labels, target = as_labels(preds, target, num_classes)
    require_finite(preds)
    counts, ignored = _count_on_cpu(labels, target, num_classes, ignore_index)
    if int(counts.sum()) + ignored != target.numel():
        unknown = _largest_unknown(labels, target, num_classes, ignore_index)
        _refuse_unknown(unknown, num_classes, ignore_index, names)
    return counts.to(labels.device)


def class_iou(
    intersection: torch.Tensor, union: torch.Tensor, ignore_index: int | None
) -> torch.Tensor:
    """Return intersection / union of each class, (K,), nan for an `ignore_index` in 0 … K-1."""
    iou = intersection / union
    if ignore_index is not None and 0 <= ignore_index < len(iou):
        iou[ignore_index] = torch.nan
    return iou


def scores(confusion: torch.Tensor, ignore_index: int | None = None) -> dict[str, torch.Tensor]:
    """Turn a confusion matrix into scores, in float64 (Long et al. 2015, section 5).

    Args:
        confusion: (K, K) counts, rows truth, columns prediction.
        ignore_index: where it is one of the classes, the IoU of that class is nan.

    Returns:
        `miou`, mean IoU over the classes in the truth or the prediction; `iou` (K,), nan for the
        other classes; `pixel_accuracy`; `mean_accuracy` over the classes in the truth; `fwiou`,
        IoU weighted by class frequency in the truth; `confusion` (K, K) int64. All are in 0 … 1,
        and nan if no pixel is counted. On the matrix's device (on the CPU for MPS, which has no
        float64).
    """
    if confusion.device.type == "mps":
        confusion = confusion.cpu()
    counts = confusion.to(torch.float64)
    correct, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = class_iou(correct, truth + predicted - correct, ignore_index)
    share = truth / truth.sum()
    return {
        "miou": iou.nanmean(),
        "iou": iou,
        "pixel_accuracy": correct.sum() / truth.sum(),
        "mean_accuracy": (correct / truth).nanmean(),
        "fwiou": torch.where(truth == 0, share, share * iou).sum(),
        "confusion": confusion,
    }


class SegmentationMetrics(DatasetMetric):
    """Dataset-level mIoU, IoU per class, accuracies and the confusion matrix.

    One int64 matrix is summed over all updates and processes and divided once, in float64: never a
    mean over images or batches. A class absent from truth and prediction has IoU nan and is
    excluded from the mean; a class that is predicted but absent from the truth has IoU 0 and is
    included. An `ignore_index` in 0 … K-1 is excluded from the mean too, as in torchmetrics.

    `update(preds, target)` takes the arguments of `confusion_counts`; `compute()` returns the dict
    of `scores`, `scalars()` the part of it that can be logged. Logits that are not finite and
    values outside 0 … K-1 raise `InputError` in `update`, on CUDA in `compute`, because a check at
    each update would synchronise. If no pixel was counted, `compute` warns and returns nan.

    Args:
        num_classes: K, background included.
        ignore_index: true label of ignored pixels, or None.

    Raises:
        InputError: `num_classes` is less than 1.

    Examples:
        >>> import torch
        >>> from effseg.metrics import SegmentationMetrics
        >>> metrics = SegmentationMetrics(num_classes=3, ignore_index=255)
        >>> metrics.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
        >>> metrics.iou
        tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
        >>> {name: round(float(value), 2) for name, value in metrics.scalars().items()}
        {'miou': 0.5, 'pixel_accuracy': 0.67, 'mean_accuracy': 0.75, 'fwiou': 0.5}
    """

    dimensions: ClassVar[dict[str, int]] = {"iou": 1, "confusion": 2}
    counts: torch.Tensor
    unknown: torch.Tensor
    infinite: torch.Tensor

    def __init__(
        self, num_classes: int = 21, ignore_index: int | None = IGNORE_INDEX, **kwargs: Any
    ) -> None:
        """Start from zero counts; `kwargs` are those of `torchmetrics.Metric`."""
        super().__init__(num_classes, ignore_index, **kwargs)
        self.ignore_index = ignore_index
        if num_classes == 1:
            rank_zero_warn("SegmentationMetrics: of one class every score is 1; a mask has two")
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("unknown", torch.full((2,), _ALL_KNOWN), dist_reduce_fx="max")
        self.add_state("infinite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add one image or one batch; see `confusion_counts`."""
        options = (self.num_classes, self.ignore_index)
        if not preds.is_cuda:
            self.counts += confusion_counts(preds, target, *options).to(self.counts.device)
            return
        labels, target = as_labels(preds, target, self.num_classes)
        if target.numel() == 0:
            return
        device = self.counts.device
        self.counts += count_pairs(labels, target, *options).to(device)
        unknown = _largest_unknown(labels, target, *options).to(device)
        self.unknown = torch.maximum(self.unknown, unknown)
        self.infinite |= all_finite(preds).logical_not().to(self.infinite)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the scores of everything since the last reset; see `scores`."""
        if self.infinite:
            raise InputError(_NOT_FINITE)
        _refuse_unknown(self.unknown, self.num_classes, self.ignore_index)
        if not self.counts.any():
            rank_zero_warn("SegmentationMetrics: no pixel was counted, so every score is nan")
        return scores(self.counts, self.ignore_index)

    @property
    def confusion(self) -> torch.Tensor:
        """The (K, K) int64 confusion matrix, rows truth, columns prediction."""
        return self.compute()["confusion"]

    @property
    def iou(self) -> torch.Tensor:
        """IoU of each class, (K,) float64, nan for a class absent from truth and prediction."""
        return self.compute()["iou"]

    @property
    def recall(self) -> torch.Tensor:
        """Recall of each class's pixels, (K,) float64, nan for a class absent from the truth."""
        confusion = self.compute()["confusion"].double()
        return confusion.diagonal() / confusion.sum(1)
