"""The focal loss, with its gradient made photo by photo on the way."""

# B batch, A anchors, K classes.

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from effseg.losses.assignment import IGNORED


def focal_sum(
    logits: torch.Tensor,
    labels: torch.Tensor,
    known: torch.Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 1.5,
) -> torch.Tensor:
    """Sum the focal loss over all entries (arXiv 1708.02002, equation 5), in float32.

    Logits of a detector are a large tensor: 49,104 × 90 of one photo at 512 pixels. Autograd would
    keep three of that size until the backward pass; here one is kept, the gradient.

    Args:
        logits: (B, A, K) float32.
        labels: (B, A) int64, see :class:`effseg.losses.assignment.Targets`.
        known: (B, K) bool, the classes that count in a photo. None: all.
        alpha: weight of the positive entries; negatives have 1 - alpha.
        gamma: exponent of the focal factor (1 - p)^γ.

    Returns:
        0-dim sum, not yet divided by the number of positives.
    """
    total: torch.Tensor = _FocalSum.apply(logits, labels, known, alpha, gamma)
    return total


class _FocalSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        known: torch.Tensor | None,
        alpha: float,
        gamma: float,
    ) -> torch.Tensor:
        slopes = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros(())
        for i, (x, label) in enumerate(zip(logits, labels, strict=True)):
            # All entries are taken as negatives first, and the positive ones then corrected: one
            # in some hundred thousand is positive, and no one-hot tensor is made.
            value, slope = _negative(x, gamma, None if slopes is None else slopes[i])
            weight = (1 - alpha) * (label != IGNORED).to(x)[:, None]
            if known is not None:
                weight = weight * known[i]
            value.mul_(weight)
            slope.mul_(weight)
            column, positive = label.clamp(min=0)[:, None], (label >= 0)[:, None]
            as_positive, fall = _negative(-x.gather(1, column), gamma)
            correction = alpha * as_positive - value.gather(1, column)
            total += value.sum() + torch.where(positive, correction, 0.0).sum()
            slope.scatter_(1, column, torch.where(positive, -alpha * fall, slope.gather(1, column)))
        ctx.save_for_backward(slopes)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad, None, None, None, None


def _negative(
    logits: torch.Tensor, gamma: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p^γ · -log(1 - p) of p = sigmoid(logits), and its derivative, in ``out``.

    The derivative is p^γ · (γ (1 - p) · -log(1 - p) + p).
    """
    cross_entropy = F.softplus(logits)
    log_p = logits - cross_entropy
    p = log_p.exp()
    focus = log_p.mul_(gamma).exp_()
    slope = torch.mul(cross_entropy, 1 - p, out=out).mul_(gamma).add_(p).mul_(focus)
    return focus.mul_(cross_entropy), slope
