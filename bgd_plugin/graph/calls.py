"""The calls of a graph that compute with a weight: their arguments and geometry, and who else reads the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.graph.computed import module_at
from bgd_plugin.graph.kinds import FUNCTIONS, MODULES, kind_of
from bgd_plugin.nn import PQModule
from bgd_plugin.pq.blocks import Geometry

__all__ = [
    "LOOKED_UP",
    "attribute",
    "call_geometry",
    "call_input",
    "calls_by_weight",
    "conv_arguments",
    "function_of",
    "has_computed_geometry",
    "kind_at",
    "looks_rows_up",
    "module_around",
    "pointwise",
    "spoken",
    "users_of_parameters",
]

_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
LOOKED_UP = "a look-up"
"""Among the users of a parameter: a function that looks rows up in it, as an embedding that is tied to a head."""
_LOOK_UPS: dict[Any, int] = {torch.nn.functional.embedding: 1, torch.ops.aten.embedding.default: 0}
_CONV_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def call_input(node: fx.Node) -> fx.Node:
    """The node whose value a layer's call takes as input."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def call_geometry(graph_module: fx.GraphModule, node: fx.Node) -> Geometry:
    """The geometry of a call: kernel, stride, padding, dilation, groups."""
    if node.op == "call_module":
        module = module_at(graph_module, str(node.target))
        if hasattr(module, "in_features"):
            return Geometry.linear()
        conv: Any = module
        if getattr(conv, "transposed", False):  # a transposed convolution is one matrix product for each input position
            return pointwise(len(conv.kernel_size), conv.groups)
        return Geometry.of(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if FUNCTIONS[function_of(node)] == "linear":
        return Geometry.linear()
    values = conv_arguments(node)
    weight = values["weight"]
    shape = _weight_shape(graph_module, weight)
    if FUNCTIONS[function_of(node)].startswith("conv_transpose"):
        return pointwise(len(shape) - 2, values["groups"])
    return Geometry.of(tuple(shape[2:]), values["stride"], values["padding"], values["dilation"], values["groups"])


def pointwise(dimensions: int, groups: int) -> Geometry:
    """The geometry of a layer that reads one position at a time, with this number of spatial dimensions and groups."""
    return Geometry.of((1,) * dimensions, 1, 0, 1, groups)


def conv_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional call by name, with their defaults."""
    return _CONV_DEFAULTS | dict(zip(_CONV_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)


def function_of(node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls."""
    assert callable(node.target)
    return node.target


def _weight_shape(graph_module: fx.GraphModule, node: fx.Node) -> torch.Size:
    if node.op == "call_module":  # a FloatWeight or PQWeight
        module: Any = module_at(graph_module, str(node.target))
        return torch.Size(module.weight_shape if isinstance(module, PQModule) else module.weight.shape)
    value: Any = attribute(graph_module, str(node.target))
    return torch.Size(value.shape)


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _weight_node(node: fx.Node) -> Any:
    """The node whose value is the weight of a functional call."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def _is_functional(node: fx.Node) -> bool:
    """Whether a node calls a function that computes as a layer."""
    return node.op == "call_function" and node.target in FUNCTIONS


def calls_by_weight(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The calls that compute with each weight, by the module's or the parameter's path, in order of the first call."""
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
                # its own key: a weight shared by a module and a function differs from one shared by modules
                calls.setdefault(path_of.setdefault(-id(value), str(weight.target)), []).append(node)
            elif not _is_weight_module(graph_module, weight):
                calls[node.name] = [node]
    return calls


def _is_weight_module(graph_module: fx.GraphModule, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(module_at(graph_module, str(node.target)), PQModule)
    )


def users_of_parameters(graph_module: fx.GraphModule) -> dict[int, set[str]]:
    """The users of each parameter (by id): called modules, by path, and functions that read it as a tensor."""
    users: dict[int, set[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = module_at(graph_module, str(node.target))
            for parameter in module.parameters():
                users.setdefault(id(parameter), set()).add(_canonical_path(graph_module, module) or str(node.target))
        elif node.op == "get_attr":
            value = attribute(graph_module, str(node.target))
            for user in node.users:
                is_layer = _is_functional(user) and _weight_node(user) is node
                who = "its calls" if is_layer else LOOKED_UP if _looks_up(user, node) else spoken(user)
                users.setdefault(id(value), set()).add(who)
    return users


def looks_rows_up(node: fx.Node) -> bool:
    """Whether a node calls a function that looks rows up in a table."""
    return node.op == "call_function" and node.target in _LOOK_UPS


def _looks_up(user: fx.Node, table: fx.Node) -> bool:
    """Whether a function looks rows up in this table."""
    place = _LOOK_UPS.get(user.target) if user.op == "call_function" else None
    if place is None:
        return False
    return (user.args[place] if len(user.args) > place else user.kwargs.get("weight")) is table


def spoken(node: fx.Node) -> str:
    """A node in the user's words: what it does and in which module, because its name is the tracer's."""
    if node.op == "call_module":
        return f"layer {str(node.target)!r}"
    what = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", node.op)
    path = module_around(node)
    return f"{what} in {path!r}" if path else what


def module_around(node: fx.Node) -> str:
    """The path of the module whose code a node comes from; empty for the network itself, or if unknown."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack and isinstance(stack[-1], tuple) else ""
    return path if isinstance(path, str) and "[" not in path else ""


def _canonical_path(graph_module: fx.GraphModule, module: nn.Module) -> str:
    return next((path for path, child in graph_module.named_modules() if child is module), "")


def has_computed_geometry(call: fx.Node) -> bool:
    """Whether the graph computes the stride, padding, dilation or groups of a functional call."""
    return any(isinstance(v, fx.Node) for k, v in conv_arguments(call).items() if k in _CONV_DEFAULTS)


def kind_at(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    """The kind of the layer that a node calls; None if it calls another module."""
    return kind_of(module_at(graph_module, str(node.target)))
