"""A linear layer whose float weight is held in a narrow form (`encoding.narrow`), as an operator of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.encoding.narrow import from_narrow
from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.narrow_dot import narrow_dot_program
from bgd_plugin.kernels.tiles import rows_of_a_tile

__all__ = ["narrow_linear"]

_MOST_DOTS = 4
"""Number of inputs up to which the weight is read once for each, and never widened."""


@torch.library.custom_op("bgd_plugin::narrow_linear", mutates_args=())
def narrow_linear(x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`; at most a tile of the weight is wide at a time.

    Args:
        x: `[..., columns]`, of the scales' dtype.
        numbers: `[rows, columns]`, of a narrow weight.
        scales: `[1]` or `[rows]`, as in `encoding.narrow`.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]`.
    """
    inputs = x.reshape(-1, numbers.shape[1]).contiguous()
    program = narrow_dot_program(numbers.element_size() * 8) if _suits_dots(inputs, numbers) else None
    if program is None:
        output = inputs.new_empty(len(inputs), len(numbers))
        for first, tile in _tiles(numbers, scales):
            torch.mm(inputs, tile.t(), out=output[:, first : first + len(tile)])
    else:
        output = _by_dots(program, inputs.float(), numbers)
        output = (output if numbers.dtype == torch.int16 else output.mul_(scales.float())).to(x.dtype)
    if bias is not None:
        output = output.add_(bias)
    return output.view(*x.shape[:-1], len(numbers))


@narrow_linear.register_fake
def _(x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], numbers.shape[0])


def _suits_dots(inputs: Tensor, numbers: Tensor) -> bool:
    is_here = inputs.is_cpu and numbers.is_cpu and numbers.is_contiguous()
    return is_here and len(inputs) <= _MOST_DOTS and inputs.dtype != torch.float64


def _by_dots(program: Any, inputs: Tensor, numbers: Tensor) -> Tensor:
    """One input after the other; each reads all numbers."""
    (rows, columns), output = numbers.shape, inputs.new_empty(len(inputs), len(numbers))
    places = [(x.data_ptr(), numbers.data_ptr(), y.data_ptr()) for x, y in zip(inputs, output, strict=True)]

    def calls(first: int, last: int) -> list[tuple[int, ...]]:
        return [(*place, first, last, columns) for place in places]

    share_rows(rows, columns, program, calls)
    return output


def _tiles(numbers: Tensor, scales: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows, some at a time: (index of the first, `[count, columns]`)."""
    step = rows_of_a_tile(*numbers.shape)
    for first in range(0, len(numbers), step):
        own = scales if numbers.dtype == torch.int16 else scales[first : first + step]
        yield first, from_narrow(numbers[first : first + step], own)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, numbers, scales, _ = inputs
    ctx.save_for_backward(numbers, scales)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the weight has none."""
    numbers, scales = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        parts = (gradient[..., first : first + len(tile)] @ tile for first, tile in _tiles(numbers, scales))
        to_x = sum(parts, start=gradient.new_zeros(*gradient.shape[:-1], numbers.shape[1]))
    if ctx.needs_input_grad[3]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, None, None, to_bias


narrow_linear.register_autograd(_backward, setup_context=_setup)
