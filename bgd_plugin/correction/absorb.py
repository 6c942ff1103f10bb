"""What a fit leaves to a layer's neighbours: a scale on each row, for the batch norm, and a shift of the bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.graph import FoundLayer, module_at

__all__ = ["absorb_row_scale_", "row_scale_bounds", "shift_biases_"]


@torch.no_grad()
def absorb_row_scale_(norm: Any, scale: Tensor) -> None:
    """Make a batch norm undo a factor on each channel of its input, so that its output is unchanged.

    Args:
        norm: the batch norm; its statistics are replaced, its parameters are kept.
        scale: `[channels]`, positive.
    """
    scale = scale.to(norm.running_mean.device).double()
    variance = (norm.running_var.double() + norm.eps) * scale.square() - norm.eps
    mean = norm.running_mean.double() * scale
    norm.running_mean, norm.running_var = (t.to(norm.running_mean) for t in (mean, variance))


@torch.no_grad()
def row_scale_bounds(norm: Any) -> tuple[Tensor, Tensor]:
    """The smallest and largest factor per channel, `[channels]`, that `absorb_row_scale_` can undo in a batch norm.

    The variance must stay above eps, which is added to it, and the dtype must be able to hold the statistics.
    """
    limits = torch.finfo(norm.running_var.dtype)
    sigma = (norm.running_var.double() + norm.eps).sqrt().clamp(min=limits.tiny)
    least = max(2 * norm.eps, limits.tiny) ** 0.5 / sigma
    largest = torch.minimum((limits.max / 4) ** 0.5 / sigma, limits.max / 4 / norm.running_mean.double().abs())
    return torch.minimum(least, largest), largest


@torch.no_grad()
def shift_biases_(network: nn.Module, layer: FoundLayer, shift: Tensor) -> None:
    """Add a shift to the bias of a layer, and to those of the modules that hold the same weight.

    Args:
        network: changed in place; it gets new parameters, since the old ones may be shared with another network.
        layer: whose `bias` is a path in the network.
        shift: `[C_out]`.
    """
    if layer.bias is None:
        return
    shifted: dict[int, nn.Parameter] = {}
    for path in (layer.bias, *(f"{target}.bias" for target in layer.tied if not layer.functional)):
        owner_path, _, name = path.rpartition(".")
        owner = module_at(network, owner_path)
        bias = owner._parameters.get(name)
        if bias is not None:
            value = nn.Parameter(bias + shift.to(bias), requires_grad=False)
            owner._parameters[name] = shifted.setdefault(id(bias), value)
