"""Kernels of trellis windows as operators of torch, with shapes and gradients, as `operators` has those of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.kernels.operators import linear_gradients
from bgd_plugin.kernels.plain import linear_by_tiles
from bgd_plugin.kernels.window_decoding import decode_window_rows
from bgd_plugin.kernels.window_linear import lookup_windows
from bgd_plugin.pq.forms import FORMS, TRELLIS
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.windows import decode_windows

__all__ = ["run_window_decode", "run_window_linear", "window_decode", "window_linear"]


def _can_compute(scale: Tensor, codes: Tensor) -> bool:
    is_known = codes.dtype == torch.uint8 and scale.dtype != torch.float64
    return codes.is_cpu and codes.is_contiguous() and is_known and AVAILABLE


def _to_scale(gradient: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """A row's scale multiplies all its values of the table."""
    values: Tensor = window_decode(torch.ones_like(scale), codes)
    return (gradient * values).sum(1)


@torch.library.custom_op("bgd_plugin::window_decode", mutates_args=())
def window_decode(scale: Tensor, codes: Tensor) -> Tensor:
    """The weight `[rows, columns]` decoded from row scales and codes: by a kernel on a CPU, elsewhere by torch.

    Args:
        scale: `[rows]`.
        codes: uint8 `[bytes, columns]`.
    """
    return decode_window_rows(scale, codes) if _can_compute(scale, codes) else decode_windows(scale, codes)


@window_decode.register_fake
def _(scale: Tensor, codes: Tensor) -> Tensor:
    return scale.new_empty(scale.shape[0], codes.shape[1])


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_decode(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    scale, codes = ctx.saved_tensors
    return _to_scale(gradient, scale, codes), None


window_decode.register_autograd(_backward_of_decode, setup_context=_setup_decode)


@torch.library.custom_op("bgd_plugin::window_linear", mutates_args=())
def window_linear(x: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: by a kernel on a CPU, elsewhere with the weight decoded some rows at a time.

    Args:
        x: `[..., columns]`.
        scale: `[rows]`, of x's type.
        codes: uint8 `[bytes, columns]`.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]`.
    """
    if _can_compute(scale, codes):
        return lookup_windows(x, scale, codes, mask, bias)
    return linear_by_tiles(FORMS[TRELLIS], x, scale, codes, mask, bias)


@window_linear.register_fake
def _(x: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, codes, mask, bias = inputs
    ctx.save_for_backward(x, scale, codes, mask)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, scale, codes, mask = ctx.saved_tensors
    return linear_gradients(
        ctx,
        gradient,
        lambda: masked(window_decode(scale, codes), mask),
        lambda own: _to_scale(own, scale, codes),
    )


window_linear.register_autograd(_backward, setup_context=_setup)


def run_window_linear(x: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`window_linear` without gradients: torch.compile sees the operator, every other caller gets the kernel.

    Args:
        x, scale, codes, mask, bias: of the shapes in `window_linear`.

    Returns:
        `[..., rows]`.
    """
    if torch.compiler.is_compiling():
        output: Tensor = window_linear(x, scale, codes, mask, bias)
        return output
    return lookup_windows(x, scale, codes, mask, bias)


def run_window_decode(scale: Tensor, codes: Tensor) -> Tensor:
    """`window_decode` without gradients: torch.compile sees the operator, every other caller gets the kernel.

    Args:
        scale, codes: of the shapes in `window_decode`.

    Returns:
        `[rows, columns]`.
    """
    if torch.compiler.is_compiling():
        output: Tensor = window_decode(scale, codes)
        return output
    return decode_window_rows(scale, codes)
