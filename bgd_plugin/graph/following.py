"""The batch norm that a layer's output runs into."""

from __future__ import annotations

from torch import fx, nn

__all__ = ["following_batchnorm"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def following_batchnorm(graph_module: fx.GraphModule, calls: tuple[str, ...]) -> str | None:
    """Path of the batch norm with running statistics that alone reads a layer's output, and reads nothing else.

    Args:
        calls: names of the nodes that compute with the layer's weight; with more than one there is no such batch norm.
    """
    if len(calls) != 1:
        return None
    call = next(node for node in graph_module.graph.nodes if node.name == calls[0])
    users = list(call.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    target = str(users[0].target)
    module = graph_module.get_submodule(target)
    uses = sum(1 for node in graph_module.graph.nodes if node.op == "call_module" and node.target == target)
    has_statistics = isinstance(module, _BatchNorm) and module.running_mean is not None
    return target if has_statistics and uses == 1 else None
