"""The batch norms that follow layers in a network that is not a graph, found in its largest traceable parts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from bgd_plugin.errors import TraceError
from bgd_plugin.graph.finding_layers import find_layers
from bgd_plugin.graph.following import following_batchnorm
from bgd_plugin.graph.tracer import trace
from bgd_plugin.nn import has_running_statistics

__all__ = ["batchnorms_in_parts"]


def batchnorms_in_parts(network: nn.Module) -> dict[str, str]:
    """By layer's target, the path of the batch norm that `following_batchnorm` finds in the traceable parts."""
    return {
        prefix + layer.target: f"{prefix}{norm}"
        for prefix, part in _graphs(network, "")
        for layer in find_layers(part)[0]
        if not layer.hidden and (norm := following_batchnorm(part, layer.calls))
    }


def _graphs(network: nn.Module, prefix: str) -> Iterator[tuple[str, fx.GraphModule]]:
    """The largest parts of a network that trace, with the prefix of their names."""
    for name, child in network.named_children():
        if not any(has_running_statistics(module) for module in child.modules()):
            continue
        try:
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                raise TraceError(f"{name}: no forward")
            yield f"{prefix}{name}.", trace(child)
        except TraceError:
            yield from _graphs(child, f"{prefix}{name}.")
