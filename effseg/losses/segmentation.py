"""Segmentation losses: our cross-entropy, and smp's region losses by name."""

# B images, K classes, H W pixels

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from effseg.data.sample import IGNORE_INDEX
from effseg.distributed import sum_over_processes
from effseg.errors import InputError
from effseg.models.heads import upsample

_SMP_LOSSES: dict[str, type[nn.Module]] = {
    "dice": smp.losses.DiceLoss,
    "lovasz": smp.losses.LovaszLoss,
    "tversky": smp.losses.TverskyLoss,
    "focal": smp.losses.FocalLoss,
}


def _readable(tensor: torch.Tensor) -> bool:
    """Return whether values can be checked: on a GPU that would synchronise."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_target(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, stride: int = 1
) -> None:
    """Check the shapes and, on the CPU, that every value is a class (CUDA has an assertion)."""
    sides = [side * stride for side in logits.shape[2:]]
    if logits.ndim != 4 or [len(logits), *sides] != list(target.shape):
        raise InputError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)}: "
            "expected (B, K, H, W) and (B, H, W)"
        )
    if not _readable(target):
        return
    unknown = (target != ignore_index) & ((target < 0) | (target >= logits.shape[1]))
    if bool(unknown.any()):
        raise InputError(
            f"target contains the value {int(target[unknown][0])}: "
            f"expected 0 to {logits.shape[1] - 1} or {ignore_index} (ignored)"
        )


def _check_fractions(label_smoothing: float, ohem: float | None) -> None:
    if ohem is not None and not 0 < ohem <= 1:
        raise InputError(f"ohem is {ohem}: expected a fraction in (0, 1], or null")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing is {label_smoothing}: expected 0 to 1")


def _check_weights(class_weights: Any) -> None:
    if not isinstance(class_weights, Sequence) or isinstance(class_weights, str):
        raise InputError(f"class_weights {class_weights!r}: expected a list, one weight per class")
    for weight in class_weights:
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise InputError(f"class_weights contains {weight}: expected 0 or more")
    if not any(class_weights):
        raise InputError(f"class_weights {class_weights}: expected at least one above 0")


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem: float | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over the valid pixels; 0, not nan, if there are none.

    Computed in float32 (float64 for float64 logits), even under autocast, as
    sum / max(number of valid pixels, 1). Class weights work as in torch: the weighted sum is
    divided by the sum of the weights of the pixels' true classes (by 1 if that is 0).

    OHEM (Shrivastava et al. 2016, arXiv 1604.03540) keeps the ceil(ohem x V) of the batch's V valid
    pixels with the largest loss (weights and smoothing included); the others add no loss and no
    gradient and are not in the divisor.

    Args:
        logits: (B, K, H, W), any floating-point dtype.
        target: (B, H, W) uint8 or int64, 0 … K-1 or `ignore_index`.
        ignore_index: target value of ignored pixels.
        class_weights: (K,) weights, finite and not negative.
        label_smoothing: fraction in 0 … 1 of the target that is spread over all classes.
        ohem: fraction in (0, 1] of the valid pixels to keep; None keeps all.

    Returns:
        0-dim loss.

    Raises:
        InputError: shapes that do not match, a fraction out of range, or, on the CPU, a negative
            weight or a target value that is neither a class nor `ignore_index`.
    """
    _check_target(logits, target, ignore_index)
    _check_fractions(label_smoothing, ohem)
    if class_weights is not None and _readable(class_weights):
        _check_weights(class_weights.tolist())
    total, divisor = _cross_entropy_sums(
        logits, target, ignore_index, class_weights, label_smoothing, ohem
    )
    return total / torch.where(divisor > 0, divisor, 1.0)


def _cross_entropy_sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
    ohem: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses and its divisor: the number of pixels, or their weights."""
    if class_weights is not None and tuple(class_weights.shape) != (logits.shape[1],):
        raise InputError(
            f"class_weights has shape {tuple(class_weights.shape)}: "
            f"expected ({logits.shape[1]},), one weight per class"
        )
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = target.long()
        weights = None if class_weights is None else class_weights.to(logits)
        valid = target != ignore_index
        losses = functional.cross_entropy(
            logits,
            target,
            weight=weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        counts = valid.to(logits.dtype)
        if weights is not None:
            counts = torch.where(valid, weights[target.masked_fill(~valid, 0)], 0.0)
        if ohem is not None:
            hardness = losses.detach().masked_fill(~valid, -math.inf).flatten()
            order = hardness.argsort(descending=True)
            # A mask by rank, not a slice: reading a slice's length would synchronise. In integers,
            # with the share as a ratio: MPS has no float64, and float32 no such counts.
            ranks = torch.arange(len(order), device=order.device)
            share, whole = Fraction(str(ohem)).limit_denominator(2**31).as_integer_ratio()
            kept = ranks * whole < share * valid.sum()
            losses = losses.flatten()[order] * kept
            counts = counts.flatten()[order] * kept
        return losses.sum(), counts.sum()


class SegmentationLoss(nn.Module):
    """A weighted sum of segmentation losses.

    The terms are `cross_entropy` and, from smp in "multiclass" mode, `dice` (Milletari et al.
    2016), `lovasz` (Lovász-Softmax over the classes of the batch, Berman et al. 2018), `tversky`
    (Salehi et al. 2017, alpha = beta = ½, which equals Dice) and `focal` (Lin et al. 2017, a
    sigmoid per class, gamma 2, mean over pixels and classes). smp's Dice and Tversky divide by K;
    classes absent from the batch add 0. Each is computed in float32, and is 0 with zero gradients
    if every pixel is ignored.

    Args:
        terms: name to weight, for example `{"cross_entropy": 1.0, "dice": 0.5}`.
        ignore_index: target value of ignored pixels.
        class_weights: K weights, not negative; for `cross_entropy` only.
        label_smoothing: for `cross_entropy` only.
        ohem: fraction of hard pixels to keep, in (0, 1]; for `cross_entropy` only.

    Raises:
        InputError: no term or an unknown one, weights that are negative, infinite or all 0, a
            fraction out of range.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        terms: Mapping[str, float] | None = None,
        ignore_index: int = IGNORE_INDEX,
        class_weights: Sequence[float] | torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        ohem: float | None = None,
    ) -> None:
        """Check the options; without `terms` the loss is cross-entropy alone."""
        super().__init__()
        if isinstance(class_weights, torch.Tensor):
            class_weights = class_weights.tolist()
        self.terms = {"cross_entropy": 1.0} if terms is None else dict(terms)
        if not self.terms:
            raise InputError("terms is empty: expected at least one loss")
        for name, weight in self.terms.items():
            if name != "cross_entropy" and name not in _SMP_LOSSES:
                names = ", ".join(["cross_entropy", *_SMP_LOSSES])
                raise InputError(f"loss {name}: unknown; expected one of {names}")
            if not 0 <= weight < math.inf:
                raise InputError(f"terms: {name} has weight {weight}: expected 0 or more")
        self.smp_losses = nn.ModuleDict(
            {
                name: _SMP_LOSSES[name](mode="multiclass", ignore_index=ignore_index)
                for name in self.terms
                if name in _SMP_LOSSES
            }
        )
        if class_weights is not None:
            _check_weights(class_weights)
        _check_fractions(label_smoothing, ohem)
        self.ignore_index = ignore_index
        self.label_smoothing, self.ohem = label_smoothing, ohem
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float)
        # Not persistent: a checkpoint holds the model, the recipe holds the weights.
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self, logits: torch.Tensor, target: torch.Tensor, over_processes: bool = True
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute every term.

        Cross-entropy is the mean over the valid pixels of all processes; the other terms are
        averaged over processes, weighted by their shares of the valid pixels.

        Args:
            logits: (B, K, H, W), any floating-point dtype; or (B, K, H/s, W/s) with an integer s,
                upsampled here bilinearly (half-pixel centres). Cross-entropy without OHEM then
                upsamples one image at a time, and again in the backward pass, to save memory.
            target: (B, H, W) uint8 or int64, 0 … K-1 or `ignore_index`.
            over_processes: count over all processes, which then all have to call this.

        Returns:
            The weighted sum (0-dim), and each term's unweighted value, detached.

        Raises:
            InputError: as `cross_entropy`; class weights that are not K.
        """
        stride = target.shape[-1] // logits.shape[-1] if target.ndim == 3 else 1
        _check_target(logits, target, self.ignore_index, stride)
        if stride > 1 and (self.terms.keys() != {"cross_entropy"} or self.ohem is not None):
            logits, stride = upsample(logits, stride), 1
        share: torch.Tensor | float = 1.0
        if over_processes and self.smp_losses:
            valid = (target != self.ignore_index).sum().float()
            total, world = sum_over_processes(valid)
            share = valid * world / total.clamp(min=1.0) if world > 1 else 1.0
        values: dict[str, torch.Tensor] = {}
        for name in self.terms:
            if name == "cross_entropy":
                values[name] = self._cross_entropy(logits, target, stride, over_processes)
            else:
                values[name] = self._smp_term(name, logits, target) * share
        total = torch.stack([self.terms[name] * value for name, value in values.items()]).sum()
        return total, {name: value.detach() for name, value in values.items()}

    def _cross_entropy(
        self, logits: torch.Tensor, target: torch.Tensor, stride: int, over_processes: bool
    ) -> torch.Tensor:
        def sums(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if stride > 1:
                logits = upsample(logits, stride)
            options = (self.ignore_index, self.class_weights, self.label_smoothing, self.ohem)
            return _cross_entropy_sums(logits, target, *options)

        if stride > 1:  # image by image, so that only one is upsampled at a time
            parts = [
                checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False)
                for part in zip(logits[:, None], target[:, None], strict=True)
            ]
            total, divisor = (torch.stack(values).sum() for values in zip(*parts, strict=True))
        else:
            total, divisor = sums(logits, target)
        if over_processes:
            divisor, world = sum_over_processes(divisor)
            divisor = divisor / world
        return total / torch.where(divisor > 0, divisor, 1.0)

    def _smp_term(self, name: str, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            logits, target = logits.float(), target.long()
            # smp's focal is nan and its Lovász an empty tensor if every pixel is ignored. Both
            # select pixels by a mask, which synchronises anyway, so this check costs nothing.
            if name in ("focal", "lovasz") and not bool((target != self.ignore_index).any()):
                return logits[:, :0].sum()
            value: torch.Tensor = self.smp_losses[name](logits, target)
            return value
