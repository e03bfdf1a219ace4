"""BiFPN: weighted bidirectional feature fusion, repeated (arXiv 1911.09070, section 3)."""

# B batch, C channels of the pyramid, H W cells of a level, N inputs of a node.

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from effseg.errors import InputError
from effseg.models.layers import (
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


class Node(NamedTuple):
    """A fusion node: its pyramid level, and the ids of its input maps, its level's first."""

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


def needed_nodes(nodes: Sequence[Node], levels: Collection[int]) -> tuple[set[int], set[int]]:
    """Return the nodes and the levels of the cell's input that output levels depend on.

    A node that no head depends on gets no gradient: it would cost time and make
    DistributedDataParallel fail.
    """
    count, low = len(nodes) // 2 + 1, min(node.level for node in nodes)
    output = {node.level: count + i for i, node in enumerate(nodes)}  # a level's last node
    needed = {output[level] for level in levels}
    for i in range(len(nodes) - 1, -1, -1):
        if count + i in needed:
            needed.update(nodes[i].inputs)
    return {i - count for i in needed if i >= count}, {low + i for i in needed if i < count}


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
        offsets: Sequence[int],
        even: bool,
        *,
        channels: int,
        fusion: Fusion,
        per_channel: bool,
        activation: str,
    ) -> None:
        """Make the node for inputs of these widths, the first of the node's level.

        `offsets` are the inputs' levels above (+1), at (0) or below (-1) the node's; those below
        have even sides if `even`. An input of another width than `channels` gets a 1×1 convolution.
        """
        super().__init__()
        self.offsets, self.even = tuple(offsets), even
        self.laterals = nn.ModuleDict(
            {
                str(i): Lateral(width, channels)
                for i, width in enumerate(in_channels)
                if width != channels
            }
        )
        self.fuse = Fuse(len(in_channels), fusion, channels if per_channel else None)
        self.activation = activation_layer(activation)
        self.conv = SeparableConv2d(channels, channels)
        self.bn = BatchNorm2d(channels)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse maps into one of the size of the first."""
        resized = []
        for i, (x, offset) in enumerate(zip(maps, self.offsets, strict=True)):
            key = str(i)
            if key in self.laterals:
                x = self.laterals[key](x)
            if offset > 0:
                x = upsample_like(x, maps[0])
            elif offset < 0:
                x = downsample(x, self.even)
            resized.append(x)
        y: torch.Tensor = self.bn(self.conv(self.activation(self.fuse(resized))))
        return y


class BiFPNCell(nn.Module):
    """One top-down and bottom-up pass; builds only the nodes that its outputs depend on."""

    def __init__(
        self,
        graph: Sequence[Node],
        in_channels: Sequence[int],
        outputs: Collection[int],
        channels: int,
        depth: int,
        make_node: Callable[[Sequence[int], Sequence[int], bool], FusionNode],
    ) -> None:
        """Make the nodes of `graph` that `outputs` (levels) depend on, named by their index.

        `in_channels` are the widths of the cell's inputs, finest first. Above `depth`, the
        encoder's, sides may be odd.
        """
        super().__init__()
        self.graph, self.outputs = graph, sorted(outputs)
        self.low, self.count = min(node.level for node in graph), len(in_channels)
        level_of = [self.low + i for i in range(self.count)] + [node.level for node in graph]
        widths = [*in_channels, *[channels] * len(graph)]
        self.nodes = nn.ModuleDict()
        for i in sorted(needed_nodes(graph, outputs)[0]):
            level, inputs = graph[i]
            offsets = [level_of[j] - level for j in inputs]
            self.nodes[str(i)] = make_node([widths[j] for j in inputs], offsets, level <= depth)

    def forward(
        self, pyramid: dict[int, torch.Tensor], nodes: Collection[int], top_down: Collection[int]
    ) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
        """Map the input pyramid to the output pyramid, finest first; runs only `nodes`.

        Also returns the maps of the top-down path at the levels `top_down`.
        """
        maps = {level - self.low: x for level, x in pyramid.items()}
        first: dict[int, torch.Tensor] = {}
        last: dict[int, torch.Tensor] = {}
        for name, module in self.nodes.items():
            i = int(name)
            if i in nodes:
                level, inputs = self.graph[i]
                last[level] = maps[self.count + i] = module([maps[j] for j in inputs])
                first.setdefault(level, last[level])  # the top-down path comes first
        output = {level: last[level] for level in self.outputs if level in last}
        return output, [first[level] for level in top_down]


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
    ) -> None:
        """Make the pyramid on features of these widths, index = level (0 is the image).

        `out_levels` are read downstream (all by default): nodes that only others need are not
        built. The other arguments are the `decoder_*` of `Network`.

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
        if isinstance(channels, Sequence):  # as of smp's Unet
            raise InputError(f"decoder_channels={channels}: expected one width for all levels")
        for name, value in (("layers", layers), ("channels", channels)):
            if value < 1:
                raise InputError(f"decoder_{name}={value}: expected at least 1")
        if fusion not in get_args(Fusion):
            raise InputError(
                f"decoder_fusion={fusion!r}: expected one of {', '.join(get_args(Fusion))}"
            )
        read = set(range(low, high + 1) if out_levels is None else out_levels)
        if not read or not read <= set(range(low, high + 1)):
            raise InputError(f"out_levels={out_levels}: expected levels of {low} … {high}")
        self.levels, self.out_levels = (low, high), sorted(read)
        self.channels = channels
        self.grad_checkpointing = False
        self.encoder_levels = range(low, min(high, depth) + 1)
        self.extra_levels = range(depth + 1, high + 1)
        self.extra = (
            Lateral(encoder_channels[depth], channels)
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
        )
        self.graph = bifpn_nodes(low, high)
        cells: list[BiFPNCell] = []
        for index in range(layers - 1, -1, -1):
            widths = first if index == 0 else [channels] * (high - low + 1)
            cells.insert(0, BiFPNCell(self.graph, widths, read, channels, depth, make_node))
            _, read = needed_nodes(self.graph, read)
        self.cells = nn.ModuleList(cells)
        init_glorot(self)

    def forward(
        self,
        features: Sequence[torch.Tensor],
        levels: Sequence[int] | None = None,
        top_down: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Map encoder features (index = level) to maps (B, C, H, W), finest first.

        Args:
            features: the encoder's features.
            levels: the out_levels needed in this call; other nodes do not run. None: all.
            top_down: levels of which the last cell's top-down map is returned too, after those; of
                nodes that run.
        """
        levels = self.out_levels if levels is None else sorted(levels)
        needed = set(levels)
        nodes: list[set[int]] = []
        for _ in self.cells:
            run, needed = needed_nodes(self.graph, needed)
            nodes.insert(0, run)
        pyramid = {level: features[level] for level in self.encoder_levels}
        x = features[-1]
        for level in self.extra_levels:
            x = downsample(self.extra(x) if level == self.extra_levels[0] else x)
            pyramid[level] = x
        added: list[torch.Tensor] = []
        for cell, run in zip(self.cells, nodes, strict=True):
            arguments = (pyramid, run, top_down if cell is self.cells[-1] else ())
            if self.grad_checkpointing and self.training:
                pyramid, added = checkpoint(cell, *arguments, use_reentrant=False)
            else:
                pyramid, added = cell(*arguments)
        return [*(pyramid[level] for level in levels), *added]
