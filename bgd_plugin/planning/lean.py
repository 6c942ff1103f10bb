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
from torch.nn import functional

from bgd_plugin.config import BGDConfig
from bgd_plugin.encoding.significant import round_to_bits
from bgd_plugin.graph import attribute, following_batchnorm, module_at
from bgd_plugin.nn import freeze_norms_
from bgd_plugin.planning.survey import Survey

__all__ = ["WEIGHT_BITS", "coarse_weights", "freeze_lean_norms_", "is_lean"]

WEIGHT_BITS = 5
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_WEIGHT, _BIAS = 1, 2
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
    readers = [(node, _weight_of(graph, node)) for node in graph.graph.nodes]
    runs = Counter(id(weight) for _, weight in readers if weight is not None)
    found = {}
    for node, weight in readers:
        name = f"{node.target}.weight" if node.op == "call_module" else str(node.target)
        if weight is None or survey.storages.get(name, "float16") == "float16" or runs[id(weight)] != 1:
            continue
        call = _plain_call(graph, node)
        if weight.ndim > 2 and weight.shape[1] == 1 and call is not None:
            norm = following_batchnorm(graph, (call.name,))
            if norm is not None:
                found[name] = call.name, norm
    return found


def _weight_of(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The weight that a node reads: that of the module which it calls, or the parameter that it gets."""
    if node.op == "call_module":
        return module_at(graph, str(node.target))._parameters.get("weight")
    value = attribute(graph, str(node.target)) if node.op == "get_attr" else None
    return value if isinstance(value, nn.Parameter) else None


def _plain_call(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The convolution that uses a weight read by a node, if it has no bias and is not transposed."""
    if node.op == "call_module":
        module = module_at(graph, str(node.target))
        is_plain = module._parameters.get("bias") is None and not getattr(module, "transposed", False)
        return node if is_plain else None
    if len(node.users) != 1:
        return None
    (call,) = node.users
    arguments = dict(enumerate(call.args))
    bias = call.kwargs.get("bias", arguments.get(_BIAS))
    is_weight = node is call.kwargs.get("weight", arguments.get(_WEIGHT))
    return call if call.target in _CONVOLUTIONS and is_weight and bias is None else None
