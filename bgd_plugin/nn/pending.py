"""Weights that code of others reads, and that are not decoded where it only convolves with them.

On several threads, a decoded weight lies in the cache of one core, where the others have to fetch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from bgd_plugin.kernels.convolution import is_faster, slide
from bgd_plugin.kernels.switch import usable
from bgd_plugin.nn.base import PQModule
from bgd_plugin.nn.pointwise import at_each_position, is_linear

__all__ = ["PendingWeight", "pending"]

_DIMENSIONS = 2
_tracing: Any = fx._symbolic_trace
_modules: Any = torch.nn.modules.module


class PendingWeight(Tensor):
    """The weight of a convolution of images, `[rows, channels, height, width]`, in inference on a CPU.

    `torch.conv2d` computes with the codes, as a quantized layer of torch's own class does; everything else that is done
    with it is done with the decoded weight.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Convolve with the codes, or call `func` with decoded weights."""
        options = kwargs or {}
        if func is torch.conv2d:
            found = _convolved(*args, **options)
            if found is not None:
                return found
            if type(args[0]) is not PendingWeight and len(args) > 1:  # quicker than to look everywhere
                return func(args[0], _decoded(args[1]), *args[2:], **options)
        args, options = tree_map_only(PendingWeight, _decoded, (args, options))
        return func(*args, **options)


def pending(source: PQModule) -> Tensor | None:
    """The weight of a module that returns one, not decoded; None where it has to be, or nothing is gained.

    Args:
        source: its `forward` takes nothing, and returns its weight, which is its matrix in another shape.
    """
    if torch.compiler.is_compiling() or torch.get_num_threads() == 1 or len(source.weight_shape) != 2 + _DIMENSIONS:
        return None
    if source._forward_hooks or source._forward_pre_hooks or _modules._has_any_global_hook():
        return None
    codebook, codes, _ = source.held()
    if _tracing.is_fx_symbolic_tracing() or not usable(codebook, codebook, codes):
        return None
    found = Tensor._make_subclass(PendingWeight, _blank(source.weight_shape, codebook.dtype))
    vars(found).update(source=source, decoded=None)
    return found


@lru_cache(maxsize=1024)
def _blank(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What has a shape, and takes no memory."""
    with torch.inference_mode(False):
        return torch.empty(1, dtype=dtype, device="cpu").expand(shape)


def _decoded(weight: PendingWeight) -> Tensor:
    """The weight; the same tensor each time, so that a change in place stays."""
    own = vars(weight)
    if own["decoded"] is None:
        own["decoded"] = own["source"].forward()
    found: Tensor = own["decoded"]
    return found


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """`torch.conv2d` with the codes; None where that is not possible, or not faster."""
    own = vars(weight)
    source: PQModule | None = own.get("source")
    if source is None or own["decoded"] is not None or groups != 1 or isinstance(padding, str):
        return None
    codebook, codes, mask = held = source.held()
    if not usable(input, codebook, codes, bias):
        return None
    shape: Any = tuple(source.weight_shape[-_DIMENSIONS:]), _pair(stride), _pair(padding), _pair(dilation)
    if shape[:3] == ((1, 1), (1, 1), (0, 0)):
        if is_linear(input, source.weight_shape[1], _DIMENSIONS, held, source.has_blocks):
            return at_each_position(source.kernels.lookup, input, _DIMENSIONS, held, bias)
    elif mask is None and source.has_blocks and is_faster(input, codebook, codes, shape):
        return slide(input, codebook, codes, bias, shape)
    return None


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * _DIMENSIONS
    return tuple(value) * (_DIMENSIONS // len(value))
