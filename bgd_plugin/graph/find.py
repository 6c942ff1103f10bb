"""Find the layers of a graph: what can be quantized, and why the rest is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.graph.computed import module_at
from bgd_plugin.graph.inside import bias_of, find_inside, unfit
from bgd_plugin.graph.kinds import FUNCTIONS, MODULES, family_of, kind_of
from bgd_plugin.graph.layer import FoundLayer, LeftLayer
from bgd_plugin.nn import PQModule
from bgd_plugin.pq.blocks import Geometry

__all__ = ["attribute", "call_geometry", "call_input", "find_layers"]

_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


# A function that none of these brings is a network's own: what it does with a weight shows when it runs.
_LIBRARIES = frozenset(("torch", "operator", "_operator", "math", "builtins"))


def find_layers(network: nn.Module) -> tuple[list[FoundLayer], list[LeftLayer]]:
    """All layers that can be quantized, and all weights left alone, each with its reason.

    In the order in which they run; for a network that is not a graph, in the order in which it holds them.
    """
    if not isinstance(network, fx.GraphModule):
        found, left = find_inside(network)
        return _tied(found), left
    return _find_in_graph(network)


def _find_in_graph(graph_module: fx.GraphModule) -> tuple[list[FoundLayer], list[LeftLayer]]:
    calls = _group_calls(graph_module)
    users = _users_of_parameters(graph_module)
    found: list[FoundLayer] = []
    left: dict[str, str] = {}
    for target, nodes in calls.items():
        outcome = _examine(graph_module, _speaker(graph_module, target, nodes), nodes, users)
        if isinstance(outcome, FoundLayer):
            found.append(outcome)
        elif outcome:
            left[outcome.name] = outcome.reason
    names = {layer.name for layer in found}
    for other in _other_weights(graph_module, calls):
        if isinstance(other, FoundLayer):
            found.append(other)
        elif other.name not in names:
            left.setdefault(other.name, other.reason)
    order = {node.name: index for index, node in enumerate(graph_module.graph.nodes)}
    found.sort(key=lambda layer: order[layer.calls[0]])
    return found, [LeftLayer(name=name, reason=reason) for name, reason in left.items()]


def _speaker(graph_module: fx.GraphModule, target: str, nodes: list[fx.Node]) -> str:
    """Which of tied modules the layer goes by: an embedding is fitted on the inputs of the layer tied to it, if any."""
    if nodes[0].op != "call_module":
        return target
    others = [node for node in nodes if _kind_at(graph_module, node) != "embedding"]
    return str(others[0].target) if others and _kind_at(graph_module, nodes[0]) == "embedding" else target


def _tied(found: list[FoundLayer]) -> list[FoundLayer]:
    """One layer for all that hold the same weight."""
    groups: dict[int, list[FoundLayer]] = {}
    for layer in found:
        groups.setdefault(id(layer.weight), []).append(layer)
    return [_as_one(group) for group in groups.values()]


def _as_one(group: list[FoundLayer]) -> FoundLayer:
    """An embedding gives its family to the layers that are tied to it, and is fitted on the inputs that they get."""
    first = next((layer for layer in group if layer.kind != "embedding"), group[0])
    family = "embedding" if any(layer.kind == "embedding" for layer in group) else first.family
    return replace(first, family=family, tied=tuple(layer.target for layer in group if layer is not first))


def call_input(node: fx.Node) -> fx.Node:
    """The node whose value a layer's call takes as input."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def call_geometry(graph_module: fx.GraphModule, node: fx.Node) -> Geometry:
    """How a call walks over its input: kernel, stride, padding, dilation, groups."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if hasattr(module, "in_features"):
            return Geometry.linear()
        conv: Any = module
        if getattr(conv, "transposed", False):  # a transposed convolution is one matrix product for each input position
            return pointwise(len(conv.kernel_size), conv.groups)
        return Geometry.of(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if FUNCTIONS[_function(node)] == "linear":
        return Geometry.linear()
    values = _conv_arguments(node)
    weight = values["weight"]
    shape = _weight_shape(graph_module, weight)
    return Geometry.of(tuple(shape[2:]), values["stride"], values["padding"], values["dilation"], values["groups"])


def pointwise(dimensions: int, groups: int) -> Geometry:
    """Each position by itself."""
    return Geometry.of((1,) * dimensions, 1, 0, 1, groups)


def _conv_arguments(node: fx.Node) -> dict[str, Any]:
    return _CONV_DEFAULTS | dict(zip(_CONV_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)


def _function(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _weight_shape(graph_module: fx.GraphModule, node: fx.Node) -> torch.Size:
    if node.op == "call_module":  # a FloatWeight or PQWeight
        module: Any = graph_module.get_submodule(str(node.target))
        return torch.Size(module.weight_shape if isinstance(module, PQModule) else module.weight.shape)
    value: Any = attribute(graph_module, str(node.target))
    return torch.Size(value.shape)


def attribute(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _weight_node(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def _is_functional(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in FUNCTIONS


def _group_calls(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Calls that compute with one weight, under the module's or the parameter's path, in order of the first call."""
    calls: dict[str, list[fx.Node]] = {}
    path_of: dict[int, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = module_at(graph_module, str(node.target))
            if isinstance(module, tuple(MODULES)):
                key = id(module._parameters.get("weight", module))
                calls.setdefault(path_of.setdefault(key, str(node.target)), []).append(node)
        elif _is_functional(node):
            weight = _weight_node(node)
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                value = attribute(graph_module, str(weight.target))
                # its own key: a weight that a module and a function share is told apart from one that modules share
                calls.setdefault(path_of.setdefault(-id(value), str(weight.target)), []).append(node)
            elif not _is_weight_module(graph_module, weight):
                calls[node.name] = [node]
    return calls


def _is_weight_module(graph_module: fx.GraphModule, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(graph_module.get_submodule(str(node.target)), PQModule)
    )


def _users_of_parameters(graph_module: fx.GraphModule) -> dict[int, set[str]]:
    """For each parameter, who uses it: called modules by path, and kinds of function that read it as a tensor."""
    users: dict[int, set[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            for parameter in module.parameters():
                users.setdefault(id(parameter), set()).add(_canonical_path(graph_module, module) or str(node.target))
        elif node.op == "get_attr":
            value = attribute(graph_module, str(node.target))
            for user in node.users:
                is_layer = _is_functional(user) and _weight_node(user) is node
                users.setdefault(id(value), set()).add("its calls" if is_layer else f"node {user.name!r}")
    return users


def _canonical_path(graph_module: fx.GraphModule, module: nn.Module) -> str:
    return next((path for path, child in graph_module.named_modules() if child is module), "")


def _examine(
    graph_module: fx.GraphModule, target: str, nodes: list[fx.Node], users: dict[int, set[str]]
) -> FoundLayer | LeftLayer | None:
    """A layer that can be quantized, or the reason why not."""
    first = next((node for node in nodes if str(node.target) == target), nodes[0])
    functional = first.op == "call_function"
    if functional and target == first.name:
        return LeftLayer(name=target, reason="its weight is computed in the graph, not a parameter")
    name = _user_name(graph_module, target) if functional else target
    owner = graph_module.get_submodule(target.rpartition(".")[0] if functional else target)
    attribute = target.rpartition(".")[2] if functional else "weight"
    weight = owner._parameters.get(attribute)
    if weight is None:
        return LeftLayer(
            name=name, reason="its weight is not a parameter (a hook, such as a norm's, computes it): bake it first"
        )
    if not weight.is_floating_point():
        return LeftLayer(name=name, reason=f"its weight has dtype {weight.dtype}")
    tied = () if functional else tuple(sorted({str(node.target) for node in nodes} - {target}))
    tied = tuple(path for path in tied if module_at(graph_module, path) is not owner)
    kind = FUNCTIONS[_function(first)] if functional else str(kind_of(owner))
    if any(kind_of(module_at(graph_module, path)) not in (kind, "embedding") for path in tied):
        return LeftLayer(name=name, reason=f"its weight is also that of another kind of layer, {', '.join(tied)}")
    if not functional and (reason := unfit(owner, kind, functional=False)):
        return LeftLayer(name=name, reason=reason)
    others = sorted(users.get(id(weight), set()) - {target, *tied, "its calls"})
    if others or (not functional and "its calls" in users.get(id(weight), set())):
        return LeftLayer(name=name, reason=f"its weight is also used by {', '.join(others) or 'a function'}")
    for node in nodes:
        if functional and any(isinstance(v, fx.Node) for k, v in _conv_arguments(node).items() if k in _CONV_DEFAULTS):
            return LeftLayer(name=name, reason="its stride, padding or groups are computed in the graph")
    groups = 1 if kind in ("linear", "embedding") else call_geometry(graph_module, first).groups
    is_embedding = any(kind_of(module_at(graph_module, path)) == "embedding" for path in tied)
    bias = _bias_of_call(graph_module, first) if functional else bias_of(owner, target)
    return FoundLayer(
        name=name,
        target=target,
        kind=kind,
        family="embedding" if is_embedding else family_of(kind, weight.shape, groups),
        weight=weight,
        calls=tuple(node.name for node in nodes if functional or _kind_at(graph_module, node) == kind),
        functional=functional,
        groups=groups,
        bias=None if kind.startswith("conv_transpose") else bias,
        tied=tied,
    )


def _kind_at(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    return kind_of(module_at(graph_module, str(node.target)))


def _bias_of_call(graph_module: fx.GraphModule, call: fx.Node) -> str | None:
    """The path of the parameter that a call alone adds."""
    bias = _conv_arguments(call).get("bias")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or list(bias.users) != [call]:
        return None
    return str(bias.target) if isinstance(attribute(graph_module, str(bias.target)), nn.Parameter) else None


def _user_name(graph_module: fx.GraphModule, target: str) -> str:
    """`block.conv.weight` is called `block.conv`; a weight of any other name keeps its own."""
    owner, _, attribute = target.rpartition(".")
    parts = graph_module.get_submodule(owner).children() if owner else ()
    alone = owner and attribute == "weight" and not any(True for part in parts for _ in part.parameters())
    return owner if alone else target


def _other_weights(graph_module: fx.GraphModule, calls: dict[str, list[fx.Node]]) -> Iterator[FoundLayer | LeftLayer]:
    """Weights that no conv or linear call of the graph reads: hidden in the nodes that use them, or left alone."""
    seen: set[str] = set()
    for node in graph_module.graph.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in calls or target in seen:
            continue
        seen.add(target)
        if node.op == "call_module":
            module = module_at(graph_module, target)
            if not isinstance(module, tuple(MODULES)):
                runs = tuple(n.name for n in graph_module.graph.nodes if n.op == node.op and n.target == node.target)
                found, left = find_inside(graph_module, target, runs)
                yield from found
                yield from left
        else:
            value = attribute(graph_module, target)
            if isinstance(value, nn.Parameter) and value.ndim > 1:
                yield _read_by_function(graph_module, target, value)


def _read_by_function(graph_module: fx.GraphModule, target: str, weight: nn.Parameter) -> FoundLayer | LeftLayer:
    """A weight that goes into functions: a layer's, if a layer owns it and unknown functions alone read it."""
    readers = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target == target]
    users = list(dict.fromkeys(user for reader in readers for user in reader.users))
    owner_path, _, name = target.rpartition(".")
    owner = module_at(graph_module, owner_path)
    kind = kind_of(owner)
    if (
        kind not in FUNCTIONS.values()
        or name != "weight"
        or not users
        or not all(_is_networks_own(user) for user in users)
    ):
        names = ", ".join(sorted(user.name for user in users))
        return LeftLayer(name=target, reason=f"a plain tensor, used by {names or 'nothing'}")
    return FoundLayer(
        name=owner_path,
        target=target,
        kind=str(kind),
        family=family_of(str(kind), weight.shape, getattr(owner, "groups", 1)),
        weight=weight,
        calls=tuple(user.name for user in users),
        functional=True,
        groups=getattr(owner, "groups", 1),
        hidden=True,
        bias=bias_of(owner, owner_path),
    )


def _is_networks_own(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and module.partition(".")[0] not in _LIBRARIES
