"""Graph rewrites: replace float layers by other modules, and undo it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from bgd_plugin.graph.calls import attribute
from bgd_plugin.graph.computed import compute_parameter_, module_at, module_or_none, restore_parameter_
from bgd_plugin.graph.layer import FoundLayer
from bgd_plugin.graph.references import rebind_, redirect_
from bgd_plugin.nn import (
    FloatWeight,
    NarrowModule,
    PQModule,
    PQWeight,
    materialized,
    quantized,
    restored_parameter,
    take_hooks_,
    widened,
)
from bgd_plugin.pq.forms import BLOCKS
from bgd_plugin.pq.layout import AS_IT_IS, Layout

__all__ = [
    "Replaced",
    "become_",
    "float_module",
    "follow_",
    "install_",
    "isolate_weights_",
    "isolated_weights",
    "materialize_",
    "module_paths",
    "release_",
    "swap_",
]

Replaced = list[tuple[nn.Module, nn.Module]]
"""Modules that have been replaced, and what is in their places now."""


def module_paths(root: nn.Module, module: nn.Module) -> list[str]:
    """Every path of a module below `root`; a shared module has several."""
    return [path for path, child in root.named_modules(remove_duplicate=False) if child is module]


def float_module(root: nn.Module, target: str, layout: Layout = AS_IT_IS) -> nn.Module:
    """The module at a layer's target, or one that returns the parameter there, in this layout."""
    owner_path, _, name = target.rpartition(".")
    parameter = module_at(root, owner_path)._parameters.get(name)
    return module_at(root, target) if parameter is None else FloatWeight(parameter, layout)


def swap_(root: nn.Module, target: str, module: nn.Module, replaced: Replaced | None = None) -> None:
    """Replace the module at `target`, under each of its paths, or the parameter there, by `module`.

    The hooks of a replaced layer are kept, and other references to it, in lists and functions, follow.

    Args:
        root: changed in place.
        target: path of the module or parameter.
        module: takes its place.
        replaced: of many replacements; references follow all of them at once when `follow_` is called with it.
    """
    owner_path, _, name = target.rpartition(".")
    owner = module_at(root, owner_path)
    if name in owner._parameters:
        compute_parameter_(owner, name, module)
        return
    old = module_at(root, target)
    take_hooks_(module, old)
    if isinstance(module, PQModule) and not isinstance(old, (PQModule, FloatWeight)):
        module.stand_for(old)
        rebind_(module, {id(old): module})
    for path in module_paths(root, old):
        owner_path, _, name = path.rpartition(".")
        module_at(root, owner_path)._modules[name] = module
    if replaced is None:
        follow_(root, [(old, module)])
    else:
        replaced.append((old, module))


def follow_(root: nn.Module, replaced: Replaced) -> None:
    """Let references to replaced modules, in a network's lists and functions, follow.

    Args:
        root: changed in place.
        replaced: see `swap_`.
    """
    memo: dict[int, nn.Module] = {}
    for old, module in reversed(replaced):  # one that has been replaced in its turn gives way to the last one
        memo[id(old)] = memo.get(id(module), module)
    if memo:
        redirect_(root, memo)


def become_(old: nn.Module, module: nn.Module) -> nn.Module:
    """Turn a layer into another one in place, without access to the module that holds it.

    Args:
        old: the layer; its hooks are kept.
        module: supplies class and state; must not be used afterwards.

    Returns:
        `old`.
    """
    take_hooks_(module, old)
    vars(old).clear()
    vars(old).update(vars(module))
    old.__class__ = type(module)
    return old


def install_(
    network: nn.Module,
    layer: FoundLayer,
    codebook: Tensor,
    codes: Tensor,
    mask: Tensor | None = None,
    form: str = BLOCKS,
    replaced: Replaced | None = None,
) -> list[PQModule]:
    """Insert a layer's product-quantized modules: its own, and one with the same tensors for each tied layer.

    Args:
        network: changed in place.
        layer: as found in it.
        codebook, codes: of the shapes that their form has (`pq.forms`): `[codebook_size, block_size]` and integers
            `[rows, blocks_per_row]` for blocks.
        mask: bool, the shape of the layer's matrix; false where the decoded weight is zero. None: nowhere.
        form: of the codes, "blocks" or "trellis".
        replaced: see `swap_`.
    """
    modules: list[PQModule] = []
    for target in (layer.target, *layer.tied):
        module = quantized(float_module(network, target, layer.layout), codebook, codes, mask, form)
        if modules:
            module.codebook, module.codes = modules[0].codebook, modules[0].codes
        modules.append(module)
        swap_(network, target, module, replaced)
    return modules


def isolate_weights_(network: nn.Module, layers: Iterable[FoundLayer]) -> None:
    """Rewrite a graph, in place, so that a module at the parameter's path returns each weight that its nodes read.

    The module stands right before the first call that needs it, where the inputs of that call are known. Weights that
    modules read themselves stay parameters until they are quantized, as in a network that is not a graph.
    """
    if not isinstance(network, fx.GraphModule):
        return
    nodes = {node.name: node for node in network.graph.nodes}
    for layer in layers:
        if layer.functional:
            _isolate(network, layer, nodes[layer.calls[0]])
    network.graph.lint()
    network.recompile()


def _isolate(graph_module: fx.GraphModule, layer: FoundLayer, first_call: fx.Node) -> None:
    graph = graph_module.graph
    readers = [
        node
        for node in graph.nodes
        if node.op == "get_attr" and attribute(graph_module, str(node.target)) is layer.weight
    ]
    if not readers:
        return
    for target in (layer.target, *layer.tied):
        parent, _, name = target.rpartition(".")
        holder = module_at(graph_module, parent)
        del holder._parameters[name]
        holder._modules[name] = FloatWeight(layer.weight, layer.layout).train(holder.training)
    order = {node: index for index, node in enumerate(graph.nodes)}
    early = sorted((u for node in readers for u in node.users if order[u] < order[first_call]), key=order.__getitem__)
    with graph.inserting_before(first_call):
        value = graph.call_module(layer.target)
    if early:  # a table in which rows are looked up before the layer that is fitted runs
        with graph.inserting_before(early[0]):
            before = graph.call_module(layer.target)
        for node in readers:
            node.replace_all_uses_with(before, delete_user_cb=early.__contains__)
    for node in readers:
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def materialize_(network: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Replace product-quantized modules, and those with a narrow weight, by ordinary ones with float weights, in place.

    Args:
        network: the compressed network.
        paths: the modules to replace; None: all.

    Returns:
        `network`.
    """
    weights: dict[int, nn.Parameter] = {}  # tied layers share one
    replaced: Replaced = []
    for path, module in list(network.named_modules()):
        if paths is not None and path not in paths:
            continue
        if isinstance(module, NarrowModule):
            narrow: Any = module
            if id(module.numbers) not in weights:
                weights[id(module.numbers)] = module.as_parameter()
            swap_(network, path, widened(narrow, weights[id(module.numbers)]), replaced)
        if not isinstance(module, PQModule):
            continue
        weight = weights.setdefault(id(module.codebook), restored_parameter(module))
        if isinstance(module, PQWeight):
            _restore_parameter(network, path, weight)
        else:
            layer: Any = module
            swap_(network, path, materialized(layer, weight), replaced)
    follow_(network, replaced)
    if isinstance(network, fx.GraphModule):
        for node in network.graph.nodes:
            node.meta.pop("nn_module_stack", None)  # has the classes before the replacement; exporters rely on it
        network.graph.lint()
        network.recompile()
    return network


@contextmanager
def isolated_weights(network: nn.Module, layers: Sequence[FoundLayer]) -> Iterator[None]:
    """A context in which `isolate_weights_` has been done; copies made in it keep what it did."""
    isolate_weights_(network, layers)
    try:
        yield
    finally:
        for layer in layers:
            release_(network, layer)


def release_(network: nn.Module, layer: FoundLayer) -> None:
    """Undo `isolate_weights_` for a layer that stays float."""
    for target in (layer.target, *layer.tied):
        module = module_or_none(network, target)
        if isinstance(module, FloatWeight):
            _restore_parameter(network, target, module.weight)


def _restore_parameter(network: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner_path, _, name = path.rpartition(".")
    restore_parameter_(module_at(network, owner_path), name, parameter)
    if not isinstance(network, fx.GraphModule):
        return
    for node in list(network.graph.nodes):
        if node.op == "call_module" and node.target == path:
            with network.graph.inserting_before(node):
                node.replace_all_uses_with(network.graph.get_attr(path))
            network.graph.erase_node(node)
