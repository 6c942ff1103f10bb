"""Cut a network into blocks: parts of its graph that pass a single value to the next part."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

__all__ = ["Block", "block_module", "partition"]

_MAX_LAYERS = 4  # in a block joined from a chain; a residual block stays whole, however many it has


@dataclass(frozen=True, kw_only=True)
class Block:
    """The nodes after `start`, up to and including `end`, by name; the first block has None for `start`.

    Attributes:
        layers: targets of the quantized modules in it, in order.
    """

    start: str | None
    end: str
    layers: tuple[str, ...]


def partition(graph_module: fx.GraphModule, layers: Collection[str]) -> list[Block]:
    """Cut a network into blocks that each have a few of `layers`; cuts are where a single value is passed on.

    A residual block cannot be cut and stays whole. Layers in a chain form one block if they are parts of one numbered
    module (`features.3.conv.0`, `features.3.conv.2`), up to four. Everything after the last block with several layers
    is one block. The first block has no layers if the network begins with other modules.

    Args:
        graph_module: the network.
        layers: targets of `call_module` nodes.

    Returns:
        blocks that follow one another and cover the graph; a network that cannot be cut is one block.
    """
    segments = _segments(graph_module, layers)
    while len(segments) > 1 and not segments[-1].layers:
        segments[-2:] = [_joined(segments[-2], segments[-1])]
    blocks: list[Block] = []
    for segment in segments:
        if blocks and _belong_together(blocks[-1], segment):
            blocks[-1] = _joined(blocks[-1], segment)
        else:
            blocks.append(segment)
    while len(blocks) > 2 and len(blocks[-1].layers) == 1 == len(blocks[-2].layers):
        blocks[-2:] = [_joined(blocks[-2], blocks[-1])]
    return blocks


def block_module(graph_module: fx.GraphModule, block: Block) -> fx.GraphModule:
    """A block as a network over the same modules, from the value of its start to that of its end.

    The first block has the network's inputs, and the last one its output.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = {node.name: node for node in graph_module.graph.nodes}
    value = None
    if block.start is not None:
        copies[nodes[block.start]] = value = graph.placeholder("value")
    inside = block.start is None
    for node in graph_module.graph.nodes:
        if inside or _is_source(node):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif value is not None and _is_batch_size(node):
            copies[node] = graph.call_method("size", (value, 0))
        inside = inside or node.name == block.start
        if node.name == block.end:
            break
    if nodes[block.end].op != "output":
        graph.output(copies[nodes[block.end]])
    result = fx.GraphModule(graph_module, graph)
    result.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    result.graph.lint()
    result.recompile()
    return result


def _is_source(node: fx.Node) -> bool:
    """Whether a node's value needs no input: parameters, and modules that return one."""
    return node.op == "get_attr" or (node.op == "call_module" and not node.all_input_nodes)


def _is_batch_size(node: fx.Node) -> bool:
    """Whether a node reads the first dimension of a value, which all values of a block have in common."""
    if node.op == "call_method" and node.target == "size":
        return list(node.args[1:]) == [0] and not node.kwargs
    if node.op != "call_function" or node.target is not operator.getitem or list(node.args[1:]) != [0]:
        return False
    shape = node.args[0]
    return isinstance(shape, fx.Node) and shape.target is getattr and list(shape.args[1:]) == ["shape"]


def _segments(graph_module: fx.GraphModule, layers: Collection[str]) -> list[Block]:
    """The shortest parts between two cuts; a part without layers belongs to the one before it."""
    nodes = list(graph_module.graph.nodes)
    cuts = _cuts(nodes)
    result: list[Block] = []
    start: str | None = None
    found: list[str] = []
    for node in nodes:
        if node.op == "call_module" and node.target in layers:
            found.append(str(node.target))
        if node.op == "output" or node in cuts:
            segment = Block(start=start, end=node.name, layers=tuple(dict.fromkeys(found)))
            if result and not segment.layers:
                result[-1] = _joined(result[-1], segment)
            else:
                result.append(segment)
            start, found = node.name, []
    return result


def _cuts(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes after which their value is the only one that later nodes read."""
    last = {node: node for node in nodes}
    position = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        for used in node.all_input_nodes:
            last[used] = node
    furthest, cuts = -1, set()
    for i, node in enumerate(nodes[:-1]):
        # no later node may read a value from before this one
        is_value = node.op != "placeholder" and not _is_source(node) and not _is_batch_size(node)
        if furthest <= i and is_value and position[last[node]] > i:
            cuts.add(node)
        if not _is_source(node) and not _is_batch_size(node):
            furthest = max(furthest, position[last[node]])
    return cuts


def _belong_together(block: Block, segment: Block) -> bool:
    if not block.layers or len(block.layers) + len(segment.layers) > _MAX_LAYERS:
        return False
    common = _common_path(block.layers[0], segment.layers[0])
    return any(atom.isdigit() for atom in common)


def _common_path(one: str, other: str) -> list[str]:
    result = []
    for a, b in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if a != b:
            break
        result.append(a)
    return result


def _joined(first: Block, second: Block) -> Block:
    layers = tuple(dict.fromkeys(first.layers + second.layers))
    return Block(start=first.start, end=second.end, layers=layers)
