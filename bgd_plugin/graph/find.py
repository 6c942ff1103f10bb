"""Find the layers of a graph: what can be quantized, and why the rest is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from bgd_plugin.graph.tracer import is_quantized_elsewhere
from bgd_plugin.nn import PQModule
from bgd_plugin.pq.blocks import Geometry

__all__ = ["FoundLayer", "LeftLayer", "attribute", "call_geometry", "call_input", "find_layers", "layer_has_bias"]

_MODULES: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.linear: "linear",
}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundLayer:
    """A convolution or linear layer that can be quantized.

    Attributes:
        name: what users call it: the module's path, or the parameter's where a weight stands alone.
        target: path of the module that is, or will be, replaced.
        kind: "conv1d", "conv2d", "conv3d" or "linear".
        family: which setting of `BGDConfig` applies: "conv", "pointwise_conv", "depthwise_conv" or "linear".
        weight: `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`.
        calls: names of the nodes that compute with it, in order.
        functional: whether the weight is read by a `get_attr` node rather than held by a module that is called.
    """

    name: str
    target: str
    kind: str
    family: str
    weight: nn.Parameter
    calls: tuple[str, ...]
    functional: bool


@dataclass(frozen=True, kw_only=True)
class LeftLayer:
    """Something with weights that stays as it is, and why."""

    name: str
    reason: str


def find_layers(graph_module: fx.GraphModule) -> tuple[list[FoundLayer], list[LeftLayer]]:
    """All layers of a graph in the order in which they run, and all weights left alone, each with its reason."""
    calls = _group_calls(graph_module)
    users = _users_of_parameters(graph_module)
    found: list[FoundLayer] = []
    left: dict[str, str] = {}
    for target, nodes in calls.items():
        outcome = _examine(graph_module, target, nodes, users)
        if isinstance(outcome, FoundLayer):
            found.append(outcome)
        elif outcome:
            left[outcome.name] = outcome.reason
    names = {layer.name for layer in found}
    for name, reason in _other_weights(graph_module, calls):
        if name not in names:
            left.setdefault(name, reason)
    return found, [LeftLayer(name=name, reason=reason) for name, reason in left.items()]


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
        return Geometry.of(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if _FUNCTIONS[_function(node)] == "linear":
        return Geometry.linear()
    values = _conv_arguments(node)
    weight = values["weight"]
    shape = _weight_shape(graph_module, weight)
    return Geometry.of(tuple(shape[2:]), values["stride"], values["padding"], values["dilation"], values["groups"])


def layer_has_bias(graph_module: fx.GraphModule, layer: FoundLayer) -> bool:
    """Whether a layer adds a bias, its module's or the one given to its call."""
    if not layer.functional:
        return getattr(graph_module.get_submodule(layer.target), "bias", None) is not None
    call = next(node for node in graph_module.graph.nodes if node.name == layer.calls[0])
    return _conv_arguments(call).get("bias") is not None


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
    return node.op == "call_function" and node.target in _FUNCTIONS


def _group_calls(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Calls that compute with one weight, under the module's or the parameter's path, in order of the first call."""
    calls: dict[str, list[fx.Node]] = {}
    path_of: dict[int, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, tuple(_MODULES)):
                calls.setdefault(path_of.setdefault(id(module), str(node.target)), []).append(node)
        elif _is_functional(node):
            weight = _weight_node(node)
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                value = attribute(graph_module, str(weight.target))
                calls.setdefault(path_of.setdefault(id(value), str(weight.target)), []).append(node)
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
    first = nodes[0]
    functional = first.op == "call_function"
    if functional and target == first.name:
        return LeftLayer(name=target, reason="its weight is computed in the graph, not a parameter")
    name = _user_name(graph_module, target) if functional else target
    owner = graph_module.get_submodule(target.rpartition(".")[0] if functional else target)
    attribute = target.rpartition(".")[2] if functional else "weight"
    if parametrize.is_parametrized(owner, attribute):
        return LeftLayer(name=name, reason="its weight is parametrized (torch.nn.utils.parametrize)")
    weight = owner._parameters.get(attribute)
    if weight is None:
        return LeftLayer(
            name=name, reason="its weight is not a parameter (a hook, such as a norm's, computes it): bake it first"
        )
    if not weight.is_floating_point():
        return LeftLayer(name=name, reason=f"its weight has dtype {weight.dtype}")
    others = sorted(users.get(id(weight), set()) - {target, "its calls"})
    if others or (not functional and "its calls" in users.get(id(weight), set())):
        return LeftLayer(name=name, reason=f"its weight is also used by {', '.join(others) or 'a function'}")
    kind = _FUNCTIONS[_function(first)] if functional else _kind(owner)
    for node in nodes:
        if functional and any(isinstance(v, fx.Node) for k, v in _conv_arguments(node).items() if k in _CONV_DEFAULTS):
            return LeftLayer(name=name, reason="its stride, padding or groups are computed in the graph")
    groups = 1 if kind == "linear" else call_geometry(graph_module, first).groups
    return FoundLayer(
        name=name,
        target=target,
        kind=kind,
        family=_family(kind, weight.shape, groups),
        weight=weight,
        calls=tuple(node.name for node in nodes),
        functional=functional,
    )


def _user_name(graph_module: fx.GraphModule, target: str) -> str:
    """`block.conv.weight` is called `block.conv`; a weight of any other name keeps its own."""
    owner, _, attribute = target.rpartition(".")
    alone = owner and attribute == "weight" and not any(True for _ in graph_module.get_submodule(owner).children())
    return owner if alone else target


def _kind(module: nn.Module) -> str:
    return next(kind for base, kind in _MODULES.items() if isinstance(module, base))


def _family(kind: str, shape: torch.Size, groups: int) -> str:
    if kind == "linear":
        return "linear"
    if groups > 1 and shape[1] == 1:
        return "depthwise_conv"
    return "pointwise_conv" if math.prod(shape[2:]) == 1 else "conv"


def _other_weights(graph_module: fx.GraphModule, calls: dict[str, list[fx.Node]]) -> Iterator[tuple[str, str]]:
    """Parameters of two or more dimensions that no conv or linear call of the graph reads."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and str(node.target) not in calls:
            module = graph_module.get_submodule(str(node.target))
            kind = type(module).__name__
            if isinstance(module, PQModule):
                yield str(node.target), "already quantized"
            elif is_quantized_elsewhere(module):
                yield str(node.target), f"{kind} is quantized already, by another library"
            elif not isinstance(module, tuple(_MODULES)) and any(p.ndim > 1 for p in module.parameters()):
                yield str(node.target), f"{kind} has no product-quantized form here"
        elif node.op == "get_attr" and str(node.target) not in calls:
            value = attribute(graph_module, str(node.target))
            if isinstance(value, nn.Parameter) and value.ndim > 1:
                names = ", ".join(sorted(user.name for user in node.users))
                yield str(node.target), f"a plain tensor, used by {names or 'nothing'}"
