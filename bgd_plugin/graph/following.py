"""What a layer's output runs into: a batch norm, and an activation that clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["Following", "following"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_CLIPPING_FUNCTIONS = {F.relu: (0.0, float("inf")), torch.relu: (0.0, float("inf")), F.relu6: (0.0, 6.0)}


@dataclass(frozen=True, kw_only=True)
class Following:
    """The neighbours of a layer's output, where nothing else reads it in between.

    Attributes:
        batchnorm: path of the batch norm, None if there is none.
        affine: slope and shift `[C_out]` of that batch norm (the layer's own bias left out) as shipped.
        clip: lowest and highest output of the activation after it, None if it does not clip.
        takes_row_scale: whether the batch norm can take out a factor on each of the layer's rows.
    """

    batchnorm: str | None = None
    affine: tuple[Tensor, Tensor] | None = None
    clip: tuple[float, float] | None = None
    takes_row_scale: bool = False


def following(graph_module: fx.GraphModule, calls: tuple[str, ...], *, has_bias: bool) -> Following:
    """Look behind a layer that is called once; a layer with several calls has no neighbours.

    Args:
        calls: names of the nodes that compute with the layer's weight.
        has_bias: whether the layer adds a bias: then the batch norm's statistics cannot take a factor out.
    """
    if len(calls) != 1:
        return Following()
    call = next(node for node in graph_module.graph.nodes if node.name == calls[0])
    norm_node = _only_user(call)
    if norm_node is None or norm_node.op != "call_module":
        return Following()
    norm: Any = graph_module.get_submodule(str(norm_node.target))
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return Following()
    uses = sum(1 for n in graph_module.graph.nodes if n.op == "call_module" and n.target == norm_node.target)
    ones = torch.ones_like(norm.running_var)
    weight = norm.weight.detach() if norm.weight is not None else ones
    bias = norm.bias.detach() if norm.bias is not None else 0 * ones
    slope = weight / (norm.running_var + norm.eps).sqrt()
    return Following(
        batchnorm=str(norm_node.target),
        affine=None if has_bias else (slope, bias - norm.running_mean * slope),
        clip=_clip(graph_module, _only_user(norm_node)),
        takes_row_scale=uses == 1 and not has_bias,
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _clip(graph_module: fx.GraphModule, node: fx.Node | None) -> tuple[float, float] | None:
    if node is None:
        return None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, nn.ReLU):
            return 0.0, float("inf")
        return (float(module.min_val), float(module.max_val)) if isinstance(module, nn.Hardtanh) else None
    if node.op == "call_function" and callable(node.target):
        return _CLIPPING_FUNCTIONS.get(node.target)
    return (0.0, float("inf")) if node.op == "call_method" and node.target in ("relu", "relu_") else None
