"""BatchNorm and SiLU in training, which keep one map for the backward pass and not two."""

# B batch, C channels, H W pixels.

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.autograd.function import once_differentiable


class NormSiLU(BatchNormAct2d):
    """timm's BatchNorm with SiLU; the output of the BatchNorm is computed again, not kept.

    Autograd keeps the BatchNorm's input and its output, which SiLU's gradient needs. The output
    follows from the input by one multiplication and one addition. Outputs and statistics are
    timm's; gradients too, but for rounding. In evaluation it is timm's layer.
    """

    @classmethod
    def replace(cls, model: nn.Module) -> None:
        """Turn all of timm's in a model into these, in place."""
        for module in model.modules():
            if (
                type(module) is BatchNormAct2d
                and type(module.act) is nn.SiLU
                and type(module.drop) is nn.Identity
            ):
                module.__class__ = cls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        ours = (
            self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()  # whose own passes choose what to keep
            and x.numel() > x.shape[1]  # else torch's error about one value a channel
            and self.track_running_stats
            and self.affine
            and self.momentum is not None
        )
        if not ours:
            y: torch.Tensor = super().forward(x)
            return y
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        activated: torch.Tensor = _NormSiLU.apply(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.momentum,
            self.eps,
        )
        return activated


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        y, mean, invstd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.eps = eps
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        scale = weight * invstd
        shift = bias - mean * scale
        y = torch.addcmul(shift[:, None, None], x.to(scale), scale[:, None, None]).to(x)
        grad = torch.ops.aten.silu_backward(grad, y)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return (*grads, None, None, None, None)
