"""The kinds of layer that have a product-quantized form, as modules and as functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bgd_plugin.pq.layout import AS_IT_IS, Layout

__all__ = ["FUNCTIONS", "MODULES", "family_of", "kind_of", "layout_of", "runs_its_parents_forward"]

MODULES: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}
_METHODS = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl")
FUNCTIONS: dict[Callable[..., Any], str] = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    F.linear: "linear",
    # the same in graphs of torch.export
    torch.ops.aten.conv1d.default: "conv1d",
    torch.ops.aten.conv2d.default: "conv2d",
    torch.ops.aten.conv3d.default: "conv3d",
    torch.ops.aten.conv_transpose1d.default: "conv_transpose1d",
    torch.ops.aten.conv_transpose2d.input: "conv_transpose2d",
    torch.ops.aten.conv_transpose3d.input: "conv_transpose3d",
    torch.ops.aten.linear.default: "linear",
}


def kind_of(module: nn.Module) -> str | None:
    """The kind of a convolution, linear layer or embedding, None for any other module."""
    return next((kind for base, kind in MODULES.items() if isinstance(module, base)), None)


def runs_its_parents_forward(module: nn.Module) -> bool:
    """Whether a module of one of our kinds computes as its base class, so that a quantized one can replace it.

    It does not if its class overrides `forward` or `_conv_forward` or makes the weight a property, or if a method of
    the instance was replaced. An embedding's class may override `forward`, which then runs on decoded rows.
    """
    base = next((base for base in MODULES if isinstance(module, base)), None)
    if base is None or any(name in vars(module) for name in _METHODS):
        return False
    kind = type(module)
    kept = [name for name in _METHODS if base is not nn.Embedding or name != "forward"]
    methods = all(getattr(kind, name, None) is getattr(base, name, None) for name in kept)
    properties = any(hasattr(kind, name) for name in ("weight", "bias") if not hasattr(base, name))
    return methods and not properties


def layout_of(kind: str, groups: int) -> Layout:
    """The layout of a weight that code reads by name, for a layer of this kind with this number of groups."""
    return Layout(groups=groups) if kind.startswith("conv_transpose") else AS_IT_IS


def family_of(kind: str, shape: Sequence[int], groups: int) -> str:
    """The setting of `BGDConfig` for a layer of this kind, with a weight of this shape and this number of groups."""
    if kind in ("linear", "embedding"):
        return kind
    if kind.startswith("conv_transpose"):
        return "pointwise_conv" if groups == 1 or shape[0] > groups else "depthwise_conv"
    if groups > 1 and shape[1] == 1:
        return "depthwise_conv"
    return "pointwise_conv" if math.prod(shape[2:]) == 1 else "conv"
