"""Graph rewrites: put a module where a float layer stood, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from bgd_plugin.graph.find import FoundLayer, attribute
from bgd_plugin.nn import FloatWeight, PQModule, PQWeight, materialized, restored_parameter

__all__ = ["isolate_weights_", "materialize_", "module_paths", "swap_"]


def module_paths(root: nn.Module, module: nn.Module) -> list[str]:
    """Every path under which a module hangs: a module that is shared has several."""
    return [path for path, child in root.named_modules(remove_duplicate=False) if child is module]


def swap_(root: nn.Module, target: str, module: nn.Module) -> None:
    """Put `module` in the place of the one at `target`, under every path it has."""
    for path in module_paths(root, root.get_submodule(target)):
        owner, _, name = path.rpartition(".")
        setattr(root.get_submodule(owner), name, module)


def isolate_weights_(graph_module: fx.GraphModule, layers: Iterable[FoundLayer]) -> fx.GraphModule:
    """Rewrite a graph, in place, so that a module at the parameter's path returns each functional layer's weight.

    The module stands right before the first call that needs it, where the inputs of that call are known.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for layer in layers:
        if layer.functional:
            _isolate(graph_module, layer, nodes[layer.calls[0]])
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _isolate(graph_module: fx.GraphModule, layer: FoundLayer, first_call: fx.Node) -> None:
    graph = graph_module.graph
    readers = [
        node
        for node in graph.nodes
        if node.op == "get_attr" and attribute(graph_module, str(node.target)) is layer.weight
    ]
    parent, _, name = layer.target.rpartition(".")
    holder = graph_module.get_submodule(parent)
    del holder._parameters[name]
    setattr(holder, name, FloatWeight(layer.weight).train(holder.training))
    with graph.inserting_before(first_call):
        value = graph.call_module(layer.target)
    for node in readers:
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def materialize_(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace every product-quantized module by an ordinary one with the decoded weight, in place."""
    for path, module in list(graph_module.named_modules()):
        if isinstance(module, PQWeight):
            _restore_parameter(graph_module, path, module)
        elif isinstance(module, PQModule):
            layer: Any = module
            swap_(graph_module, path, materialized(layer))
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _restore_parameter(graph_module: fx.GraphModule, path: str, module: PQWeight) -> None:
    owner, _, name = path.rpartition(".")
    holder = graph_module.get_submodule(owner)
    delattr(holder, name)
    holder.register_parameter(name, restored_parameter(module))
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == path:
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(graph_module.graph.get_attr(path))
            graph_module.graph.erase_node(node)
