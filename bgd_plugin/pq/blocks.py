"""Cut weights and inputs into blocks, and reassemble them. All such reshaping is in this file and in `pq.layout`.

A layer's weight `[C_out, ...]` is read as a matrix `[rows = C_out, D]`, D = (C_in / groups) · prod(kernel_size), and
each row is cut into runs of `block_size` weights, the blocks. Inputs are unfolded to `[positions, D]` with the same
order of columns, so a convolution is `unfolded @ matrix.T`, and block i of a row multiplies columns i·d … (i+1)·d − 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.pq.copied import can_copy, copied

__all__ = [
    "Geometry",
    "decode",
    "from_blocks",
    "input_blocks",
    "padded",
    "sample_inputs",
    "to_blocks",
    "unfold_inputs",
]


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """Cut a weight into blocks: weight `[C_out, ...]` -> `[rows, blocks_per_row, block_size]`, a view where possible.

    Raises:
        ValueError: the block size does not divide the weights of a row.
    """
    rows = weight.shape[0]
    per_row = math.prod(weight.shape[1:])
    if block_size < 1 or per_row % block_size:
        raise ValueError(f"{per_row} weights per row do not divide into blocks of {block_size}")
    return weight.reshape(rows, per_row // block_size, block_size)


def from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `to_blocks`: from blocks `[rows, blocks_per_row, block_size]` to a weight of shape `shape`."""
    return blocks.reshape(tuple(shape))


def decode(codebook: Tensor, codes: Tensor, shape: Sequence[int]) -> Tensor:
    """Decode a weight from its codebook and codes.

    Differentiable in the codebook: a codeword's gradient is the *sum* of the gradients of its blocks.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`, any integer type.
        shape: the weight's shape, `[C_out, ...]`.

    Returns:
        the weight `[C_out, ...]`, in the codebook's dtype.
    """
    if can_copy(codebook, codes):
        return from_blocks(copied(codebook, codes), shape)
    indices = codes if codes.dtype in (torch.int32, torch.int64) else codes.to(torch.int32)
    return from_blocks(functional.embedding(indices, codebook), shape)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a layer reads its input: `kernel_size`, `stride`, `padding`, `dilation`, `groups` and so on, as in torch.

    Each tuple has one item per spatial dimension; a linear layer has none, see `Geometry.linear`.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Padding (before, after) of each spatial dimension, in positions."""
    dilation: tuple[int, ...]
    groups: int
    member: int = 0
    """Which of the matrices of a layer that holds several of them, such as a mixture's experts."""
    padding_mode: str = "zeros"
    """`zeros`, `reflect`, `replicate` or `circular`."""

    def __post_init__(self) -> None:
        """Reject a padding mode that torch does not have."""
        if self.padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding mode {self.padding_mode!r} is not zeros, reflect, replicate or circular")

    @classmethod
    def linear(cls, member: int = 0) -> Geometry:
        """The geometry of a linear layer; `member` is its index among layers whose weights share one tensor."""
        return cls(kernel_size=(), stride=(), padding=(), dilation=(), groups=1, member=member)

    def pointwise(self) -> Geometry:
        """The 1×1 geometry that visits the layer's *output* positions in the order of `unfold_inputs`."""
        ones = (1,) * len(self.kernel_size)
        return Geometry(kernel_size=ones, stride=ones, padding=((0, 0),) * len(ones), dilation=ones, groups=1)

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str = "zeros",
    ) -> Geometry:
        """Build from the arguments of `torch.nn.ConvNd` or `torch.nn.functional.convNd`.

        Args:
            kernel_size: positions per spatial dimension; its length is the number of those dimensions.
            stride, padding, dilation: in positions, one number for all dimensions or one for each. `padding` may be
                "valid", or "same", which adds an odd position at the end, as in torch.
            groups: number of groups of channels.
            padding_mode: "zeros", "reflect", "replicate" or "circular".

        Raises:
            ValueError: "same" with a stride, an unknown padding, or a tuple of the wrong length.
        """
        kernel = tuple(kernel_size)
        steps, dilations = _per_dimension(stride, len(kernel)), _per_dimension(dilation, len(kernel))
        if padding == "same":
            if any(step != 1 for step in steps):
                raise ValueError("padding 'same' needs a stride of 1")
            totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)
        elif isinstance(padding, str):
            if padding != "valid":
                raise ValueError(f"padding {padding!r} is not 'same' or 'valid'")
            pads = ((0, 0),) * len(kernel)
        else:
            pads = tuple((p, p) for p in _per_dimension(padding, len(kernel)))
        return cls(
            kernel_size=kernel,
            stride=steps,
            padding=pads,
            dilation=dilations,
            groups=groups,
            padding_mode=padding_mode,
        )


def _per_dimension(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One number per spatial dimension; a single number is repeated."""
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= dimensions
    if len(values) != dimensions:
        raise ValueError(f"{values} does not fit {dimensions} spatial dimensions")
    return values


def unfold_inputs(x: Tensor, geometry: Geometry) -> Tensor:
    """Unfold a layer's input into the rows that its weight matrix multiplies.

    Args:
        x: `[batch, C_in, *spatial]` or `[C_in, *spatial]`; for a linear layer `[..., C_in]`.
        geometry: how the layer reads its input.

    Returns:
        `[groups, positions, (C_in / groups) · prod(kernel_size)]`, columns in the order of `weight.reshape(C_out, -1)`.
        The outputs of group g are `unfolded[g] @ matrix_of_group_g.T`.

    Raises:
        ValueError: the input's shape does not suit the geometry.
    """
    windows = _copied(_windows(x, geometry), (), geometry.kernel_size)
    channel = len(geometry.kernel_size) + 1
    positions, columns = math.prod(windows.shape[:channel]), math.prod(windows.shape[channel:]) // geometry.groups
    per_group = windows.shape[channel] // geometry.groups
    grouped = windows.reshape(*windows.shape[:channel], geometry.groups, per_group, *windows.shape[channel + 1 :])
    return grouped.movedim(channel, 0).reshape(geometry.groups, positions, columns)


def sample_inputs(x: Tensor, geometry: Geometry, count: int, generator: torch.Generator) -> Tensor:
    """`unfold_inputs` at up to `count` positions, drawn at random without replacement, in ascending order.

    Only the chosen rows are gathered: memory is `count · C_in · prod(kernel_size)`, not the whole unfolded input.

    Args:
        x, geometry: as in `unfold_inputs`, x being `[N, C_in, *spatial]` or `[..., C_in]`.
        count: number of positions at most.
        generator: draws the positions.

    Returns:
        `[groups, min(count, positions), (C_in / groups) · prod(kernel_size)]`.
    """
    windows = _windows(x, geometry)
    places = windows.shape[: len(geometry.kernel_size) + 1]
    if (positions := math.prod(places)) <= count:
        return unfold_inputs(x, geometry)
    chosen = torch.randperm(positions, generator=generator, device=generator.device)[:count].sort().values
    rows = _copied(windows, torch.unravel_index(chosen.to(x.device), places), geometry.kernel_size)
    return rows.reshape(count, geometry.groups, -1).movedim(1, 0).contiguous()


def _copied(windows: Tensor, where: tuple[Tensor, ...], kernel_size: Sequence[int]) -> Tensor:
    """`windows[where]` of `[..., *kernel_size]`, one offset of the kernel at a time: several times as fast as at once.

    Where nothing is chosen (`()`), and the kernel is a single position, no copy is needed.
    """
    if math.prod(kernel_size) == 1:
        return windows[where] if where else windows
    shape = (len(where[0]), *windows.shape[len(where) :]) if where else windows.shape
    result = windows.new_empty(shape)
    for offset in itertools.product(*map(range, kernel_size)):
        place: tuple[Any, ...] = (..., *offset)
        result[place] = windows[place][where] if where else windows[place]
    return result


def input_blocks(x: Tensor, geometry: Geometry, block_size: int) -> Tensor:
    """Every block of every unfolded input as a column: `[block_size, count]`, in no particular order.

    Where blocks are whole channels, the kernel's offsets become rows, so long runs of the input are copied; this is
    several times faster than cutting `unfold_inputs` into blocks.

    Args:
        x, geometry: as in `unfold_inputs`, x being `[N, C_in, *spatial]` or `[..., C_in]`.
        block_size: d, the number of inputs that one block of weights multiplies.
    """
    area = math.prod(geometry.kernel_size)
    dimensions = len(geometry.kernel_size)
    if dimensions == 0 or block_size % area:
        return unfold_inputs(x, geometry).reshape(-1, block_size).mT
    views = _windows(x, geometry)
    before, after = views.shape[: dimensions + 1], views.shape[dimensions + 2 :]
    windows = views.reshape(*before, -1, block_size // area, *after)
    first = [dimensions + 2, *range(dimensions + 3, 2 * dimensions + 3)]
    return windows.permute(*first, 0, dimensions + 1, *range(1, dimensions + 1)).reshape(block_size, -1)


def _windows(x: Tensor, geometry: Geometry) -> Tensor:
    """A view of the padded input: `[batch, *output positions, C_in, *kernel_size]` (linear: `[positions, C_in]`)."""
    if not (dimensions := len(geometry.kernel_size)):
        return x.reshape(-1, x.shape[-1])
    if x.dim() == dimensions + 1:
        x = x.unsqueeze(0)
    if x.dim() != dimensions + 2:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not suit {dimensions} spatial dimensions")
    windows = padded(x, geometry)
    for i in range(dimensions):
        span = geometry.dilation[i] * (geometry.kernel_size[i] - 1) + 1
        if windows.shape[2 + i] < span:
            raise ValueError(f"an input of shape {tuple(x.shape)} is smaller than the kernel {geometry.kernel_size}")
        windows = windows.unfold(2 + i, span, geometry.stride[i])[..., :: geometry.dilation[i]]
    return windows.movedim(1, dimensions + 1)


def padded(x: Tensor, geometry: Geometry) -> Tensor:
    """An input with the padding of a geometry around it; the input itself if there is none.

    Args:
        x: `[batch, C_in, *spatial]`.
        geometry: how the layer reads it.

    Returns:
        `[batch, C_in, *padded spatial]`, of the same dtype.
    """
    pads = [amount for pair in reversed(geometry.padding) for amount in pair]  # the last dimension first
    if not any(pads):
        return x
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return functional.pad(x, pads, mode=mode)
