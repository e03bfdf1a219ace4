"""What the anchors of a cell predict, each by a kernel of its own or learning together."""

# B batch, C channels, H W cells of a level, A anchors of a cell, V values at an anchor.

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effseg.models.layers import SeparableConv2d


class AnchorPredictor(SeparableConv2d):
    """The last layer of a level head: V values at each of the anchors of a cell.

    In the reference every anchor has a kernel of its own for every value, and learns from the few
    boxes it takes what its neighbours learn from theirs. After :meth:`share` the kernel is a sum of
    three: each anchor's and value's own, each value's for all anchors, each anchor's for all
    values. It can say no more than before, but a box that one anchor takes teaches all of them.
    Ours, not the reference's; what a short run gains by it is in docs/benchmarks.

    A state dict holds the sum under the reference's names, and a loaded kernel is each anchor's own
    to begin with: checkpoints do not tell the two ways apart.
    """

    def __init__(self, in_channels: int, anchors: int, values: int) -> None:
        """Make the reference's layer."""
        super().__init__(in_channels, anchors * values)
        self.anchors, self.values = anchors, values
        self.by_value: nn.Conv2d | None = None
        self.by_anchor: nn.Conv2d | None = None

    def share(self) -> None:
        """Add the shared kernels; they start from zero."""
        channels = self.pointwise.in_channels
        self.by_value = nn.Conv2d(channels, self.values, 1)
        self.by_anchor = nn.Conv2d(channels, self.anchors, 1, bias=False)
        for parameter in self._shared().values():
            nn.init.zeros_(parameter)
        self.register_state_dict_post_hook(_save_sum)
        self.register_load_state_dict_pre_hook(_load_as_own)

    def _shared(self) -> dict[str, nn.Parameter]:
        return {k: p for k, p in self.named_parameters() if k.startswith("by_")}

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight (A·V, C, 1, 1) and bias (A·V,) of the pointwise convolution."""
        weight, bias = self.pointwise.weight, self.pointwise.bias
        assert bias is not None
        if self.by_value is None or self.by_anchor is None:
            return weight, bias
        assert self.by_value.bias is not None
        shared = self.by_value.weight[None] + self.by_anchor.weight[:, None]
        return weight + shared.flatten(0, 1), bias + self.by_value.bias.repeat(self.anchors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, A·V, H, W)."""
        if self.by_value is None:
            return super().forward(x)
        return F.conv2d(self.depthwise(x), *self.kernel())


def _save_sum(module: AnchorPredictor, state: dict[str, Any], prefix: str, _: Any) -> None:
    with torch.no_grad():
        names = (f"{prefix}pointwise.weight", f"{prefix}pointwise.bias")
        state |= dict(zip(names, module.kernel(), strict=True))
    for name in module._shared():
        del state[prefix + name]


def _load_as_own(module: AnchorPredictor, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state |= {prefix + k: torch.zeros_like(p) for k, p in module._shared().items()}
