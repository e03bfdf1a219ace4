"""BiFPN's node graph, as data: which maps a node fuses, and which nodes an output depends on."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A fusion node: its pyramid level, and the ids of the maps that it fuses."""

    level: int
    inputs: tuple[int, ...]


def bifpn_nodes(min_level: int, max_level: int) -> list[Node]:
    """Return the nodes of one cell in the order they are computed.

    Ids 0 … n-1 are the cell's inputs from fine to coarse, node i has id n + i. First the top-down
    path from ``max_level`` - 1 to ``min_level``, then the bottom-up path from ``min_level`` + 1 to
    ``max_level``, which fuses the level's input, its top-down node if it has one, and the node
    below (section 3.2, figure 2d).

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
    """Return for each level the id of the map that the cell gives out: its last node."""
    count = max_level - min_level + 1
    return {node.level: count + i for i, node in enumerate(nodes)}


def live_nodes(nodes: Sequence[Node], count: int, wanted: set[int]) -> tuple[set[int], set[int]]:
    """Return which nodes and which of the ``count`` inputs the wanted ids depend on.

    A node that reaches no head gets no gradient: it would cost time and stop
    DistributedDataParallel.
    """
    live = set(wanted)
    for i in range(len(nodes) - 1, -1, -1):
        if count + i in live:
            live.update(nodes[i].inputs)
    return {i for i in range(len(nodes)) if count + i in live}, {i for i in live if i < count}
