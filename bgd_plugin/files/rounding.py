"""Rounding to storage types: everything that stays float is rounded to the type in which it will be stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.encoding.eight_bit import round_to_eight_bits, to_eight_bits
from bgd_plugin.nn import PQModule, has_running_statistics, storable

__all__ = ["as_stored", "eight_bit_rows", "round_floats_", "round_weights_"]

_NORM_BUFFERS = ("running_mean", "running_var", "weight", "bias")  # the last two belong to frozen norms


@torch.no_grad()
def round_floats_(model: nn.Module, exact: Collection[str] = ()) -> None:
    """Round parameters and norm statistics in place to half precision, which halves their bytes.

    Unchanged: codebooks, weights on an 8-bit grid, tensors with values out of the range of half precision, and other
    buffers, such as the frequencies of a position encoding, which must stay exact.
    Tensors are replaced, not written to, because other networks may share them; ties within `model` are kept. On the
    meta device only the dtype changes.

    Args:
        model: changed in place.
        exact: names of parameters that stay as they are.
    """
    names = model.named_parameters(remove_duplicate=False)
    rounded: dict[int, Any] = {id(parameter): parameter for name, parameter in names if name in exact}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            is_codebook = isinstance(module, PQModule) and name == "codebook"
            if parameter is not None and not is_codebook and _wants_half(parameter):
                value = rounded.setdefault(id(parameter), nn.Parameter(_half(parameter), parameter.requires_grad))
                module._parameters[name] = value
        for name, buffer in module._buffers.items():
            is_statistics = name in _NORM_BUFFERS and has_running_statistics(module)
            is_saved = name not in module._non_persistent_buffers_set
            if buffer is not None and is_statistics and is_saved and _wants_half(buffer):
                module._buffers[name] = rounded.setdefault(id(buffer), _half(buffer))


@torch.no_grad()
def round_weights_(model: nn.Module, storages: Mapping[str, str]) -> None:
    """Round the named weights in place to their storage types; with "int8" each row (output channel) has its own scale.

    Parameters are replaced, as in `round_floats_`; ties are kept.

    Args:
        model: changed in place.
        storages: by the name of a parameter `[rows, ...]`: "int8", "float16", or "float32" for no rounding.
    """
    rounded: dict[int, nn.Parameter] = {}
    for name, storage in storages.items():
        path, _, attribute = name.rpartition(".")
        weight = model.get_submodule(path)._parameters[attribute]
        assert weight is not None
        if storage != "float32":
            rounded[id(weight)] = nn.Parameter(as_stored(weight.detach(), storage), requires_grad=False)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in rounded:
                module._parameters[attribute] = rounded[id(parameter)]


def as_stored(weight: Tensor, storage: str) -> Tensor:
    """A weight with the values that a file has in a storage type.

    Args:
        weight: `[rows, ...]`; on the meta device only the dtype changes.
        storage: "int8", or "float16".
    """
    if storage == "float16":
        return _half(weight)
    if weight.is_meta:
        return weight.to(torch.int8) if weight.dtype == torch.float32 else weight
    return round_to_eight_bits(weight.reshape(weight.shape[0], -1)).reshape(weight.shape)


def _wants_half(value: Tensor) -> bool:
    if value.dtype not in (torch.float32, torch.float64):
        return False
    return value.is_meta or eight_bit_rows(value, is_codebook=False) is None


def _half(value: Tensor) -> Tensor:
    return value.detach().half() if value.is_meta else storable(value.detach()).clone()


def eight_bit_rows(value: Tensor, *, is_codebook: bool) -> tuple[Tensor, Tensor] | None:
    """The 8-bit form, with scales, of a codebook or weight on an 8-bit grid; on the meta device, any int8 tensor.

    A codebook (`is_codebook`) has one scale, a weight one per output channel.

    Args:
        value: `[codebook_size, block_size]` or `[rows, ...]`.

    Returns:
        int8 of the shape of `value`, and float32 `[1]` or `[rows]`; None if `value` is on no such grid.
    """
    if value.numel() == 0 or not (is_codebook or value.ndim > 1):
        return None
    rows = 1 if is_codebook else value.shape[0]
    if value.is_meta:
        return (value, torch.zeros(rows, dtype=torch.float32)) if value.dtype == torch.int8 else None
    grid = to_eight_bits(value.reshape(rows, -1))
    return None if grid is None else (grid[0].reshape(value.shape), grid[1].cpu())
