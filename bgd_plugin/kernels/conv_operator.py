"""Quantized convolutions by `convolution.slide` as an operator of torch, which has gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.kernels.convolution import slide
from bgd_plugin.kernels.operators import decoded_rows, to_codebook

__all__ = ["pq_convolution"]


@torch.library.custom_op("bgd_plugin::pq_convolution", mutates_args=())
def pq_convolution(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """A convolution of two dimensions without groups: by a kernel on a CPU, elsewhere with the decoded weight.

    Args:
        x: `[batch, channels, height, width]`.
        codebook: `[codebook_size, block_size]`, of x's type.
        codes: `[rows, blocks_per_row]`, of the weight `[rows, channels · kernel]`.
        bias: `[rows]` or None.
        kernel, stride, padding, dilation: down and along.

    Returns:
        `[batch, rows, *out]`.
    """
    is_here = x.device.type == "cpu" and x.dtype == torch.float32 and stride[0] == stride[1]
    if is_here and codes.is_contiguous() and AVAILABLE:
        down, along = zip(kernel, stride, padding, dilation, strict=True)
        shape: Any = tuple(zip(down, along, strict=True))
        return slide(x.contiguous(), codebook.contiguous(), codes, bias, shape)
    weight = decoded_rows(codebook, codes).view(len(codes), x.shape[1], *kernel)
    return functional.conv2d(x, weight, bias, stride, padding, dilation)


@pq_convolution.register_fake
def _(x: Any, codebook: Any, codes: Any, bias: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    sides = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    out = [(side + 2 * pad - d * (k - 1) - 1) // s + 1 for side, k, s, pad, d in sides]
    return x.new_empty(x.shape[0], codes.shape[0], *out)  # type: ignore[no-any-return]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codebook, codes, bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, codebook, codes)
    ctx.biases = None if bias is None else [len(bias)]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The chain rule of a convolution with the decoded weight."""
    x, codebook, codes = ctx.saved_tensors
    kernel, stride, padding, dilation = ctx.geometry
    weight = decoded_rows(codebook, codes).view(len(codes), x.shape[1], *kernel)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3] and ctx.biases is not None]
    to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
        gradient, x, weight, ctx.biases, stride, padding, dilation, False, [0, 0], 1, wanted
    )
    to_own = to_codebook(to_weight, codebook, codes) if wanted[1] else None
    return to_x, to_own, None, to_bias, None, None, None, None


pq_convolution.register_autograd(_backward, setup_context=_setup)
