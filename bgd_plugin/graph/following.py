"""What follows a layer: its batch norm, and the addition that ends a residual block."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from bgd_plugin.graph.computed import module_at
from bgd_plugin.nn import normalizes

__all__ = ["added_to", "following_batchnorm", "following_batchnorm_node"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_NO_OPS = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation mode


def following_batchnorm(graph_module: fx.GraphModule, calls: tuple[str, ...]) -> str | None:
    """Path of the batch norm (with running statistics) that is the only reader of a layer's output, and reads only it.

    Args:
        calls: names of the nodes that compute with the layer's weight; with more than one there is no such batch norm.
    """
    node = following_batchnorm_node(graph_module, calls)
    return None if node is None else str(node.target)


def following_batchnorm_node(graph_module: fx.GraphModule, calls: tuple[str, ...]) -> fx.Node | None:
    """The node of the batch norm that `following_batchnorm` finds for the same `calls`."""
    if len(calls) != 1:
        return None
    call = next(node for node in graph_module.graph.nodes if node.name == calls[0])
    if call.op == "call_module" and module_at(graph_module, str(call.target))._forward_hooks:
        return None  # they may change what the norm reads
    users = list(call.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    target = str(users[0].target)
    module = module_at(graph_module, target)
    if module._forward_pre_hooks:
        return None
    uses = sum(1 for node in graph_module.graph.nodes if node.op == "call_module" and node.target == target)
    return users[0] if normalizes(module) and uses == 1 else None


def added_to(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose value is added to that of `node`, if `node` has no other reader; otherwise None.

    At the end of a residual block these are the branch and the skip, in either order. Modules that do nothing in
    evaluation mode may come in between.
    """
    users = list(node.users)
    if len(users) != 1:
        return None
    (user,) = users
    if user.op == "call_module" and _does_nothing(module_at(graph_module, str(user.target))):
        return added_to(graph_module, user)
    is_addition = (user.op == "call_function" and user.target in _ADDITIONS) or (
        user.op == "call_method" and user.target in ("add", "add_")
    )
    if not is_addition or len(user.args) != 2 or user.kwargs:
        return None
    others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
    return others[0] if len(others) == 1 else None


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, _NO_OPS) or type(module).__name__ == "StochasticDepth"
