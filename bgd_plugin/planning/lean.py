"""What else a file may save: the scales and bits of depthwise weights, and bits of frozen norms.

The scale of each channel of a depthwise convolution goes into the batch norm behind it, so that its weights are small
integers times one step. Rounded with error feedback, five bits cost next to nothing. Scales and shifts of frozen norms
keep seven significant bits.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgd_plugin.config import BGDConfig
from bgd_plugin.encoding.significant import round_to_bits
from bgd_plugin.graph import following_batchnorm, module_at
from bgd_plugin.nn import freeze_norms_
from bgd_plugin.planning.survey import Survey

__all__ = ["WEIGHT_BITS", "coarse_weights", "freeze_lean_norms_", "is_lean"]

WEIGHT_BITS = 5
_NORM_BITS = 7


def is_lean(config: BGDConfig) -> bool:
    """Whether the settings ask for this: entropy-coded codes with 8-bit weights beside them do, and "int5"."""
    return config.weight_storage == "int5" or (config.codes == "entropy" and config.weight_storage == "int8")


@torch.no_grad()
def freeze_lean_norms_(network: nn.Module, config: BGDConfig) -> None:
    """Freeze batch norms in place, with numbers of fewer bits where the settings are lean; nothing unless asked for."""
    if not config.freeze_norms:
        return
    for path in freeze_norms_(network):
        if is_lean(config) and config.float_storage == "float16":
            norm: Any = network.get_submodule(path)
            for value in (norm.weight, norm.bias):
                value.copy_(round_to_bits(value, _NORM_BITS))


def coarse_weights(survey: Survey) -> dict[str, tuple[str, str]]:
    """The weights that are rounded to small integers: for each name the call and the batch norm that reads it alone."""
    config, graph = survey.config, survey.network
    if not is_lean(config) or not isinstance(graph, fx.GraphModule):
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
