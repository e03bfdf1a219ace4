"""BiFPN: weighted bidirectional feature fusion, repeated (arXiv 1911.09070, section 3)."""

# B batch, C channels of the pyramid, H W cells of a level, N inputs of a node.

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from effseg.errors import InputError
from effseg.models.layers import (
    BN_MOMENTUM,
    BatchNorm2d,
    Lateral,
    SeparableConv2d,
    activation_layer,
    downsample,
    init_glorot,
    upsample_like,
)
from effseg.models.scaling import Fusion

FUSION_EPS = 1e-4


@dataclass(frozen=True)
class Node:
    """A fusion node: its pyramid level, and the ids of its input maps."""

    level: int
    inputs: tuple[int, ...]


def bifpn_nodes(min_level: int, max_level: int) -> list[Node]:
    """Return the nodes of one cell in order of computation.

    Ids 0 … n-1 are the cell's inputs from fine to coarse, node i has id n + i. First the top-down
    path from `max_level` - 1 to `min_level`, then the bottom-up path from `min_level` + 1 to
    `max_level`, which fuses the level's input, its top-down node if it has one, and the node
    below (section 3.2, figure 2d).

    Examples:
        >>> [(node.level, list(node.inputs)) for node in bifpn_nodes(3, 5)]
        [(4, [1, 2]), (3, [0, 3]), (4, [1, 3, 4]), (5, [2, 5])]
    """
    count = max_level - min_level + 1
    of_level = {min_level + i: [i] for i in range(count)}
    nodes: list[Node] = []

    def add(level: int, inputs: list[int]) -> None:
        of_level[level].append(count + len(nodes))
        nodes.append(Node(level, tuple(inputs)))

    for level in range(max_level - 1, min_level - 1, -1):
        add(level, [of_level[level][-1], of_level[level + 1][-1]])
    for level in range(min_level + 1, max_level + 1):
        add(level, [*of_level[level], of_level[level - 1][-1]])
    return nodes


def output_ids(nodes: Sequence[Node], min_level: int, max_level: int) -> dict[int, int]:
    """Return the id of each level's output map: its last node."""
    count = max_level - min_level + 1
    return {node.level: count + i for i, node in enumerate(nodes)}


def needed_nodes(nodes: Sequence[Node], count: int, ids: set[int]) -> tuple[set[int], set[int]]:
    """Return which nodes and which of the `count` inputs the maps `ids` depend on.

    A node that no head depends on gets no gradient: it would cost time and make
    DistributedDataParallel fail.
    """
    needed = set(ids)
    for i in range(len(nodes) - 1, -1, -1):
        if count + i in needed:
            needed.update(nodes[i].inputs)
    return {i for i in range(len(nodes)) if count + i in needed}, {i for i in needed if i < count}


class Fuse(nn.Module):
    """Weighted sum of N maps of one size (section 3.3).

    - `fast`: Σ wᵢxᵢ with wᵢ = relu(vᵢ) / (Σ relu(vⱼ) + 1e-4)
    - `softmax`: wᵢ = softmax(v)ᵢ
    - `unbounded`: wᵢ = vᵢ
    - `sum`: wᵢ = 1, no parameters

    Weights start at 1 and are normalised in float32: in bfloat16 the epsilon would vanish. The maps
    are summed one by one, because stacking them would copy all N.
    """

    def __init__(self, inputs: int, kind: Fusion, channels: int | None = None) -> None:
        """Make the weights: one per input, or with `channels` one per input and channel."""
        super().__init__()
        self.inputs, self.kind = inputs, kind
        if kind == "sum":
            self.weight = None
        else:
            shape = (inputs,) if channels is None else (inputs, channels, 1, 1)
            self.weight = nn.Parameter(torch.ones(shape))

    def normalised(self) -> torch.Tensor:
        """Return the float32 weights, (N,) or (N, C, 1, 1)."""
        assert self.weight is not None
        weight = self.weight.float()
        if self.kind == "fast":
            weight = weight.relu()
            return weight / (weight.sum(0, keepdim=True) + FUSION_EPS)
        return weight.softmax(0) if self.kind == "softmax" else weight

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse N maps (B, C, H, W) into one."""
        if self.weight is None:
            total = maps[0] + maps[1]
            for x in maps[2:]:
                total = total + x
            return total
        weights = self.normalised().to(maps[0].dtype).unbind(0)
        total = maps[0] * weights[0]
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            total = torch.addcmul(total, x, weight)
        return total


class FusionNode(nn.Module):
    """Bring the inputs to the node's level and width, fuse, activate, convolve, normalise."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        fusion: Fusion,
        per_channel: bool,
        activation: str,
        bn_momentum: float,
    ) -> None:
        """Make the node; an input of a different width gets a 1×1 convolution."""
        super().__init__()
        self.laterals = nn.ModuleDict(
            {
                str(i): Lateral(width, channels, bn_momentum)
                for i, width in enumerate(in_channels)
                if width != channels
            }
        )
        self.fuse = Fuse(len(in_channels), fusion, channels if per_channel else None)
        self.activation = activation_layer(activation)
        self.conv = SeparableConv2d(channels, channels)
        self.bn = BatchNorm2d(channels, bn_momentum)

    def forward(
        self,
        maps: Sequence[torch.Tensor],
        offsets: Sequence[int],
        target: torch.Tensor,
        even: bool = False,
    ) -> torch.Tensor:
        """Fuse maps whose levels lie `offsets` above (+1), at (0) or below (-1) the target's.

        `even` promises that the maps below the target's level have even sides.
        """
        resized = []
        for i, (x, offset) in enumerate(zip(maps, offsets, strict=True)):
            key = str(i)
            if key in self.laterals:
                x = self.laterals[key](x)
            if offset > 0:
                x = upsample_like(x, target)
            elif offset < 0:
                x = downsample(x, even)
            resized.append(x)
        y: torch.Tensor = self.bn(self.conv(self.activation(self.fuse(resized))))
        return y


class BiFPNCell(nn.Module):
    """One top-down and bottom-up pass; builds only the nodes that its outputs depend on."""

    def __init__(
        self,
        in_channels: Sequence[int],
        levels: tuple[int, int],
        outputs: set[int],
        channels: int,
        depth: int,
        make_node: Callable[[Sequence[int]], FusionNode],
    ) -> None:
        """Make the cell's nodes, named by their index in the full graph.

        Args:
            in_channels: widths of the cell's inputs, finest first.
            levels: finest and coarsest level.
            outputs: levels that are read downstream.
            channels: width of the nodes.
            depth: depth of the encoder, up to which the levels above have even sides.
            make_node: makes a node for inputs of given widths.
        """
        super().__init__()
        low, high = levels
        self.low, self.depth = low, depth
        self.graph = bifpn_nodes(low, high)
        self.count = high - low + 1
        ids = output_ids(self.graph, low, high)
        self.outputs = {level: ids[level] for level in sorted(outputs)}
        nodes, self.needs = self.depends(outputs)
        widths = [*in_channels, *[channels] * len(self.graph)]
        self.nodes = nn.ModuleDict(
            {str(i): make_node([widths[j] for j in self.graph[i].inputs]) for i in sorted(nodes)}
        )

    def _level(self, map_id: int) -> int:
        return self.low + map_id if map_id < self.count else self.graph[map_id - self.count].level

    def depends(self, levels: Iterable[int]) -> tuple[set[int], set[int]]:
        """Return the nodes, and the levels of the cell's input, that output levels need."""
        ids = {self.outputs[level] for level in levels}
        nodes, inputs = needed_nodes(self.graph, self.count, ids)
        return nodes, {self.low + i for i in inputs}

    def forward(
        self, pyramid: dict[int, torch.Tensor], nodes: set[int] | None = None
    ) -> dict[int, torch.Tensor]:
        """Map the input pyramid to the output pyramid, finest first; runs all or only `nodes`."""
        maps = {level - self.low: x for level, x in pyramid.items()}
        for name, module in self.nodes.items():
            if nodes is not None and int(name) not in nodes:
                continue
            node = self.graph[int(name)]
            offsets = [self._level(j) - node.level for j in node.inputs]
            maps[self.count + int(name)] = module(
                [maps[j] for j in node.inputs],
                offsets,
                maps[node.level - self.low],
                even=node.level <= self.depth,
            )
        return {level: maps[map_id] for level, map_id in self.outputs.items() if map_id in maps}


class BiFPN(nn.Module):
    """Pyramid over `levels` on top of an encoder's features.

    Levels coarser than the encoder's are made as in the reference (google/automl
    `efficientdet_keras.py`): the first by a 1×1 convolution, BatchNorm and max-pooling, further
    ones by pooling only. Level l has stride 2^l.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        *,
        levels: tuple[int, int] = (2, 7),
        out_levels: Sequence[int] | None = None,
        channels: int = 128,
        layers: int = 3,
        fusion: Fusion = "fast",
        fusion_per_channel: bool = False,
        activation: str = "silu",
        bn_momentum: float = BN_MOMENTUM,
    ) -> None:
        """Make the pyramid.

        Args:
            encoder_channels: widths of the encoder's features, index = level (0 is the image).
            levels: finest and coarsest level; the coarsest may be beyond the encoder's last.
            out_levels: levels that are read downstream, all by default; other nodes are not built.
            channels: width of the pyramid.
            layers: number of cells.
            fusion: see `Fuse`.
            fusion_per_channel: a fusion weight per input and channel, not per input.
            activation: `silu` or `relu6`.
            bn_momentum: momentum of the BatchNorms, PyTorch's convention.

        Raises:
            InputError: invalid levels, sizes or fusion.
        """
        super().__init__()
        low, high = levels
        depth = len(encoder_channels) - 1
        if not 1 <= low <= depth or high <= low:
            raise InputError(
                f"decoder_levels={tuple(levels)}: expected (low, high) with 1 <= low <= {depth} "
                "(the encoder's depth) and high > low"
            )
        if encoder_channels[low] == 0:  # smp's placeholder for a stride that a transformer lacks
            raise InputError(
                f"decoder_levels={tuple(levels)}: this encoder has no features at level {low}"
            )
        for name, value in (("layers", layers), ("channels", channels)):
            if value < 1:
                raise InputError(f"decoder_{name}={value}: expected at least 1")
        if fusion not in get_args(Fusion):
            raise InputError(
                f"decoder_fusion={fusion!r}: expected one of {', '.join(get_args(Fusion))}"
            )
        read = set(range(low, high + 1)) if out_levels is None else set(out_levels)
        if not read or not read <= set(range(low, high + 1)):
            raise InputError(f"out_levels={out_levels}: expected levels of {low} … {high}")
        self.levels = (low, high)
        self.channels = channels
        self.grad_checkpointing = False
        self.encoder_levels = range(low, min(high, depth) + 1)
        self.extra_levels = range(depth + 1, high + 1)
        self.extra = (
            Lateral(encoder_channels[depth], channels, bn_momentum)
            if self.extra_levels and encoder_channels[depth] != channels
            else nn.Identity()
        )
        first = [encoder_channels[level] for level in self.encoder_levels]
        first += [channels] * len(self.extra_levels)
        make_node = partial(
            FusionNode,
            channels=channels,
            fusion=fusion,
            per_channel=fusion_per_channel,
            activation=activation,
            bn_momentum=bn_momentum,
        )
        cells: list[BiFPNCell] = []
        for index in range(layers - 1, -1, -1):
            widths = first if index == 0 else [channels] * (high - low + 1)
            cells.insert(0, BiFPNCell(widths, (low, high), read, channels, depth, make_node))
            read = cells[0].needs
        self.cells = nn.ModuleList(cells)
        init_glorot(self)

    def forward(
        self, features: Sequence[torch.Tensor], levels: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Map encoder features (index = level) to the maps of out_levels, finest first.

        Args:
            features: the encoder's features.
            levels: the out_levels needed in this call; other nodes do not run. None: all.
        """
        nodes: list[set[int] | None] = [None] * len(self.cells)
        if levels is not None:
            needed = set(levels)
            for i in range(len(self.cells) - 1, -1, -1):
                nodes[i], needed = self.cells[i].depends(needed)  # type: ignore[operator]
        pyramid = {level: features[level] for level in self.encoder_levels}
        x = features[-1]
        for level in self.extra_levels:
            x = downsample(self.extra(x) if level == self.extra_levels[0] else x)
            pyramid[level] = x
        for cell, run in zip(self.cells, nodes, strict=True):
            if self.grad_checkpointing and self.training:
                pyramid = checkpoint(cell, pyramid, run, use_reentrant=False)
            else:
                pyramid = cell(pyramid, run)
        return [pyramid[level] for level in (pyramid if levels is None else sorted(levels))]


def level_pair(name: str, levels: Sequence[int]) -> tuple[int, int]:
    """Return (finest, coarsest) of an argument.

    Raises:
        InputError: not two values.
    """
    if len(levels) != 2:
        raise InputError(f"{name}={levels}: expected (finest, coarsest)")
    return int(levels[0]), int(levels[1])
