"""Quantized convolutions of small images on a CPU, without the weight (see `sliding`)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.choice import slides
from bgd_plugin.kernels.lanes import last_width, row_count, widest
from bgd_plugin.kernels.sliding import pad_program, sliding_program
from bgd_plugin.kernels.tiles import thread_address

__all__ = ["Shape", "is_faster", "slide"]

_SLACK = 64
"""Floats behind the padded input that may be read, and are not used."""
_FASTER = 4
"""How many positions are multiplied by a block in the time for a code of one."""

Shape = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
"""A convolution's kernel, stride, padding and dilation: down and along."""


def is_faster(x: Tensor, codebook: Tensor, codes: Tensor, shape: Shape) -> bool:
    """Whether `slide` takes this input, and is estimated to be faster than torch with a decoded weight.

    Args:
        x: `[batch, channels, height, width]`; any other shape is refused.
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`.
        shape: of the convolution.
    """
    if x.dim() != 4 or x.dtype != torch.float32 or not x.is_contiguous() or not x.numel():
        return False
    batch, channels, height, width = x.shape
    kernel, stride, _, _ = shape
    out, _, wide = _sizes(height, width, shape)
    if stride[0] != stride[1] or min(out) < 1:
        return False
    positions = (out[0] - 1) * wide + out[1]
    weights = len(codes) * channels * math.prod(kernel)
    inputs = channels * height * width
    return slides(weights, len(codes), codebook.shape[1], inputs, positions, math.prod(out), batch)


def slide(x: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """A convolution without groups.

    Args:
        x: float32 `[batch, channels, height, width]`, contiguous.
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`, contiguous, of the weight `[rows, channels · kernel]`.
        bias: `[rows]` or None.
        shape: of the convolution; the strides down and along are equal.

    Returns:
        `[batch, rows, *out]`, equal up to rounding to torch's result with the decoded weight.
    """
    (batch, channels, height, width), (rows, blocks), size = x.shape, codes.shape, codebook.shape[1]
    (_, _), (stride, _), (top, left), _ = shape
    (out, tall, wide), (offsets, targets) = _sizes(height, width, shape), _tables(channels, height, width, shape)
    area, positions, step = math.prod(out), len(targets), row_count()
    output, image = x.new_empty(batch, rows, *out), channels * stride * stride * tall * wide
    room, scratch = -(-(batch * image + _SLACK) // 16) * 16, widest() * step
    memory = thread_address(4 * (room + torch.get_num_threads() * scratch))
    pad_program()(x.data_ptr(), memory, room, batch * channels, height, width, top, left, stride, tall, wide)
    summand = x.new_zeros(rows) if bias is None else bias.contiguous()
    fixed = codebook.data_ptr(), codes.data_ptr(), summand.data_ptr()
    last = memory + 4 * room
    used: list[int] = []

    def calls(first: int, stop: int) -> list[tuple[int, ...]]:
        used.append(last + 4 * scratch * len(used))
        end = rows if stop == rows // step else stop * step
        tables = offsets.data_ptr(), targets.data_ptr(), used[-1]
        return [
            (memory + 4 * n * image, *fixed, output.data_ptr() + 4 * n * rows * area, *tables, first * step, end)
            + (positions, area, blocks)
            for n in range(batch)
        ]

    program = sliding_program(size, codes.element_size() * 8, last_width(positions))
    share_rows(rows // step, step * blocks * positions * batch // _FASTER, program, calls)
    return output


def _sizes(height: int, width: int, shape: Shape) -> tuple[tuple[int, int], int, int]:
    """Height and width of the output, and of the parts that the padded input is split into by the stride."""
    kernel, stride, padding, dilation = shape
    whole = [side + 2 * pad for side, pad in zip((height, width), padding, strict=True)]
    out = [(w - d * (k - 1) - 1) // s + 1 for w, k, s, d in zip(whole, kernel, stride, dilation, strict=True)]
    tall, wide = (-(-w // s) for w, s in zip(whole, stride, strict=True))
    return (out[0], out[1]), tall, wide


@lru_cache(maxsize=256)
def _tables(channels: int, height: int, width: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Where a column meets the padded input at the first position, and where each position's output is.

    A position lies in the padded input's width; those beyond the output's have targets that are written again later.
    """
    (down, along), (stride, _), _, (below, beside) = shape
    (out_height, out_width), tall, wide = _sizes(height, width, shape)
    offsets = [
        (((c * stride + y % stride) * stride + x % stride) * tall + y // stride) * wide + x // stride
        for c in range(channels)
        for y in range(0, down * below, below)
        for x in range(0, along * beside, beside)
    ]
    targets = [
        min(position // wide * out_width + position % wide, out_height * out_width - 1)
        for position in range((out_height - 1) * wide + out_width)
    ]
    with torch.inference_mode(False):
        return torch.tensor(offsets, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
