"""Which layers have a bias of their own: one that can be shifted without a change anywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx, nn

from bgd_plugin.graph.calls import attribute
from bgd_plugin.graph.computed import module_at
from bgd_plugin.graph.layer import FoundLayer

__all__ = ["with_own_bias"]


def with_own_bias(network: nn.Module, layers: Iterable[FoundLayer]) -> list[FoundLayer]:
    """The layers, each without its bias where something else holds or reads the same parameter.

    Args:
        network: in which they were found.
        layers: as found; those that share a weight may share a bias.
    """
    holders = _holders(network)
    return [layer if _is_own(network, layer, holders) else replace(layer, bias=None) for layer in layers]


def _holders(network: nn.Module) -> dict[int, set[int]]:
    """By parameter, the modules that hold it, and for a parameter that a graph reads by name, the graph."""
    holders: dict[int, set[int]] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    if isinstance(network, fx.GraphModule):
        for node in network.graph.nodes:
            if node.op == "get_attr":
                holders.setdefault(id(attribute(network, str(node.target))), set()).add(id(network.graph))
    return holders


def _is_own(network: nn.Module, layer: FoundLayer, holders: dict[int, set[int]]) -> bool:
    if layer.bias is None:
        return True
    path, _, name = layer.bias.rpartition(".")
    owner = module_at(network, path)
    targets = () if layer.functional else (layer.target, *layer.tied)
    own = {id(owner), *(id(module_at(network, target)) for target in targets)}
    # what a call of a function adds has no other reader: the layer was found so
    called = {id(network.graph)} if layer.functional and isinstance(network, fx.GraphModule) else set()
    return holders.get(id(owner._parameters.get(name)), set()) <= own | called
