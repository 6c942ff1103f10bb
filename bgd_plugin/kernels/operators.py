"""The kernels as operators of torch, with shapes and gradients, so that torch.compile keeps them whole."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.kernels.decoding import decode_rows
from bgd_plugin.kernels.linear import lookup_linear
from bgd_plugin.pq.blocks import decode
from bgd_plugin.pq.masked import masked

__all__ = ["decoded_rows", "linear_gradients", "pq_decode", "pq_linear", "run_decode", "run_linear", "to_codebook"]

_HAS_TRITON = find_spec("triton") is not None


def decoded_rows(codebook: Tensor, codes: Tensor) -> Tensor:
    """The weight `[rows, columns]` by torch's operators.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`.
    """
    return decode(codebook, codes, (codes.shape[0], codes.shape[1] * codebook.shape[1]))


def _weight(codebook: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    return masked(decoded_rows(codebook, codes), mask)


def to_codebook(gradient: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """A codeword's gradient is the sum of those of its blocks.

    Args:
        gradient: of the weight, in any shape that holds its rows one after another.
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`.
    """
    blocks = gradient.reshape(-1, codebook.shape[1])
    return torch.zeros_like(codebook).index_add(0, codes.reshape(-1).long(), blocks)


@torch.library.custom_op("bgd_plugin::pq_decode", mutates_args=())
def pq_decode(codebook: Tensor, codes: Tensor) -> Tensor:
    """The weight `[rows, columns]` decoded from a codebook and codes: by a kernel on a CPU, elsewhere by torch.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`.
    """
    if codes.is_cpu and codes.is_contiguous() and AVAILABLE:
        return decode_rows(codebook.contiguous(), codes)
    return decoded_rows(codebook, codes)


@pq_decode.register_fake
def _(codebook: Tensor, codes: Tensor) -> Tensor:
    return codebook.new_empty(codes.shape[0], codes.shape[1] * codebook.shape[1])


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_decode(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    codebook, codes = ctx.saved_tensors
    return to_codebook(gradient, codebook, codes), None


pq_decode.register_autograd(_backward_of_decode, setup_context=_setup_decode)


@torch.library.custom_op("bgd_plugin::pq_linear", mutates_args=())
def pq_linear(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`: by a kernel on a CPU or a CUDA device if there is one, otherwise with the decoded weight.

    Args:
        x: `[..., columns]`.
        codebook: `[codebook_size, block_size]`, of x's type.
        codes: `[rows, columns / block_size]`.
        mask: bool of the weight's shape, false where it is zero; None: nowhere.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]`.
    """
    if x.is_cuda and _HAS_TRITON:
        from bgd_plugin.kernels.triton_linear import triton_linear

        return triton_linear(x, codebook, codes, mask, bias)
    if x.device.type == "cpu" and x.dtype != torch.float64 and codes.is_contiguous() and AVAILABLE:
        return lookup_linear(x, codebook, codes, mask, bias)
    return functional.linear(x, _weight(codebook, codes, mask), bias)


@pq_linear.register_fake
def _(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codebook, codes, mask, bias = inputs
    ctx.save_for_backward(x, codebook, codes, mask)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, codebook, codes, mask = ctx.saved_tensors
    return linear_gradients(
        ctx, gradient, lambda: _weight(codebook, codes, mask), lambda own: to_codebook(own, codebook, codes)
    )


def linear_gradients(
    ctx: Any, gradient: Tensor, weight: Callable[[], Tensor], to_table: Callable[[Tensor], Tensor]
) -> tuple[Tensor | None, ...]:
    """The chain rule of a linear layer with the decoded weight: for x, table, codes, mask and bias.

    Args:
        ctx: holds x, table, codes and mask, and `has_bias`.
        gradient: of the output, `[..., rows]`.
        weight: decodes it, `[rows, columns]`, zero where it is masked.
        to_table: from the gradient of such a weight to that of the table it is decoded from.
    """
    x, _, _, mask = ctx.saved_tensors
    need = ctx.needs_input_grad
    to_x = to_own = to_bias = None
    rows = gradient.reshape(-1, gradient.shape[-1])
    if need[0]:
        to_x = gradient @ weight()
    if need[1]:
        to_own = to_table(masked(rows.mT @ x.reshape(-1, x.shape[-1]), mask))
    if need[4] and ctx.has_bias:
        to_bias = rows.sum(0)
    return to_x, to_own, None, None, to_bias


pq_linear.register_autograd(_backward, setup_context=_setup)


def run_linear(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`pq_linear` without gradients: torch.compile sees the operator, every other caller gets the kernel.

    Args:
        x, codebook, codes, mask, bias: of the shapes in `pq_linear`.

    Returns:
        `[..., rows]`.
    """
    if torch.compiler.is_compiling():
        output: Tensor = pq_linear(x, codebook, codes, mask, bias)
        return output
    return lookup_linear(x, codebook, codes, mask, bias)


def run_decode(codebook: Tensor, codes: Tensor) -> Tensor:
    """`pq_decode` without gradients: torch.compile sees the operator, every other caller gets the kernel.

    Args:
        codebook, codes: of the shapes in `pq_decode`.

    Returns:
        `[rows, columns]`.
    """
    if torch.compiler.is_compiling():
        output: Tensor = pq_decode(codebook, codes)
        return output
    return decode_rows(codebook, codes)
