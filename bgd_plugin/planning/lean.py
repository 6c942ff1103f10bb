"""What else a file with entropy-coded codes saves: the scales of depthwise weights.

The scale of each channel of a depthwise convolution goes into the batch norm behind it, so that its weights are small
integers times one step.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx, nn

from bgd_plugin.graph import following_batchnorm, module_at
from bgd_plugin.planning.survey import Survey

__all__ = ["WEIGHT_BITS", "coarse_weights"]

WEIGHT_BITS = 8


def coarse_weights(survey: Survey) -> dict[str, tuple[str, str]]:
    """The weights that are rounded to small integers: for each name the call and the batch norm that reads it alone."""
    config, graph = survey.config, survey.network
    if config.codes != "entropy" or config.weight_storage != "int8" or not isinstance(graph, fx.GraphModule):
        return {}
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    runs = Counter(id(_weight_of(module_at(graph, str(node.target)))) for node in calls)
    found = {}
    for node in calls:
        name, module = f"{node.target}.weight", module_at(graph, str(node.target))
        if name in survey.leftovers and _is_depthwise(module) and runs[id(_weight_of(module))] == 1:
            norm = following_batchnorm(graph, (node.name,))
            if norm is not None:
                found[name] = node.name, norm
    return found


def _weight_of(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")


def _is_depthwise(module: nn.Module) -> bool:
    weight = _weight_of(module)
    is_single = isinstance(weight, Tensor) and weight.ndim > 2 and weight.shape[1] == 1
    return is_single and module._parameters.get("bias") is None and not getattr(module, "transposed", False)
