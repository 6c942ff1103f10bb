"""Pack masks of pruned weights in as few bits as their pattern allows; a mask is true where a weight is kept.

A mask has a form, named in the file's header:

* `lines`: whole rows and columns of the weight matrix are zero; one bit per row and per column.
* `N:M`: exactly N of every M consecutive weights of a row are kept; ceil(log2(M choose N)) bits per group, so 2:4 takes
  3 bits for 4 weights. `N:M channels`: the same along the input channels, for each kernel offset.
* `positions`: few weights are zero; 32 bits for each zero.
* `bits`: any other pattern; one bit per weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.encoding.codes import pack, unpack

__all__ = ["MaskGroups", "mask_form", "mask_groups", "pack_mask", "unpack_mask"]

_GROUP_SIZES = (2, 4, 8, 16)
_FORM = re.compile(r"(\d{1,2}):(\d{1,2})( channels)?")


@dataclass(frozen=True, kw_only=True)
class MaskGroups:
    """How a mask of the form `N:M` lies in its bytes: for each group the number of a pattern, packed to `bits` bits.

    Attributes:
        size: M, weights in a group.
        bits: of a pattern's number.
        patterns: bool `[patterns, size]`, true where a weight is kept.
        shape: of the mask with the dimension that groups run along last.
        along_channels: that dimension is the input channels, moved to the end.
    """

    size: int
    bits: int
    patterns: Tensor
    shape: tuple[int, ...]
    along_channels: bool


def mask_groups(form: str, shape: Sequence[int]) -> MaskGroups:
    """What a form `N:M` says of a mask of the given shape.

    Raises:
        ValueError: the form is no `N:M`, or the shape has no groups of that size.
    """
    kept, size, along_channels = _parsed(form)
    ordered = _ordered_shape(shape, along_channels)
    if ordered[-1] % size:
        raise ValueError(f"a weight of shape {list(shape)} does not divide into groups of {size}")
    patterns = (_patterns(kept, size).unsqueeze(1) >> torch.arange(size) & 1).bool()
    return MaskGroups(
        size=size, bits=_bits(kept, size), patterns=patterns, shape=ordered, along_channels=along_channels
    )


def mask_form(mask: Tensor) -> str:
    """The form that stores a mask in the fewest bytes.

    Args:
        mask: bool `[C_out, ...]`, true where a weight is kept.
    """
    return min(_forms(mask), key=lambda form: pack_mask(mask, form).numel())


def pack_mask(mask: Tensor, form: str) -> Tensor:
    """Pack a mask `[C_out, ...]` into bytes, uint8 `[n]`.

    Raises:
        ValueError: the form is unknown, or cannot represent this mask.
    """
    if form == "bits":
        return pack(mask.to(torch.uint8), 1)
    if form == "positions":
        return (~mask).flatten().nonzero().flatten().to(torch.int32).view(torch.uint8)
    if form == "lines":
        matrix = mask.flatten(1)
        return pack(torch.cat([matrix.any(1), matrix.any(0)]).to(torch.uint8), 1)
    kept, size, along_channels = _parsed(form)
    groups = _ordered(mask, along_channels).reshape(-1, size)
    numbers = (groups.to(torch.int32) << torch.arange(size, device=mask.device)).sum(1)
    table = _patterns(kept, size).to(mask.device)
    codes = torch.searchsorted(table, numbers).clamp(max=len(table) - 1)
    if not torch.equal(table[codes], numbers):
        raise ValueError(f"the mask does not keep {kept} of each {size} weights")
    return pack(codes, _bits(kept, size))


def unpack_mask(packed: Tensor, form: str, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack_mask`: from `packed`, uint8 `[bytes]`, to the mask, bool of the given shape.

    Raises:
        ValueError: the form is unknown, or the bytes do not belong to a mask of this shape.
    """
    count, rows = math.prod(shape), shape[0]
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"a packed mask has dtype uint8 and one dimension, found {packed.dtype} {list(packed.shape)}")
    if form == "bits":
        return unpack(packed, 1, count).bool().reshape(tuple(shape))
    if form == "positions":
        return _from_positions(packed, count).reshape(tuple(shape))
    if form == "lines":
        lines = unpack(packed, 1, rows + count // rows).bool()
        return (lines[:rows, None] & lines[None, rows:]).reshape(tuple(shape))
    groups = mask_groups(form, shape)
    codes = unpack(packed, groups.bits, count // groups.size)
    if count and int(codes.max()) >= len(groups.patterns):
        raise ValueError(f"pattern {int(codes.max())} is out of range: {form} has {len(groups.patterns)} patterns")
    mask = groups.patterns.to(packed.device)[codes].reshape(groups.shape)
    return (mask.movedim(-1, 1) if groups.along_channels else mask).reshape(tuple(shape)).contiguous()


def _forms(mask: Tensor) -> Iterator[str]:
    """The forms that can represent a mask, the simple ones first."""
    yield "bits"
    yield "positions"
    matrix = mask.flatten(1)
    if torch.equal(matrix, matrix.any(1, keepdim=True) & matrix.any(0, keepdim=True)):
        yield "lines"
    for along_channels in (False, True) if mask.ndim > 2 else (False,):
        ordered = _ordered(mask, along_channels)
        for size in _GROUP_SIZES:
            if ordered.shape[-1] % size == 0:
                kept = ordered.reshape(-1, size).sum(1)
                if 0 < int(kept.min()) == int(kept.max()) < size:
                    yield f"{int(kept[0])}:{size}{' channels' if along_channels else ''}"


def _ordered(mask: Tensor, along_channels: bool) -> Tensor:
    """The mask with the dimension along which groups run moved last."""
    return mask.movedim(1, -1) if along_channels else mask.flatten(1)


def _ordered_shape(shape: Sequence[int], along_channels: bool) -> tuple[int, ...]:
    if along_channels:
        return (shape[0], *shape[2:], shape[1])
    return shape[0], math.prod(shape[1:])


def _parsed(form: str) -> tuple[int, int, bool]:
    """N, M, and whether groups run along the channels."""
    match = _FORM.fullmatch(form)
    kept, size = (int(match[1]), int(match[2])) if match else (0, 0)
    if match is None or size not in _GROUP_SIZES or not 0 < kept < size:
        raise ValueError(f"{form!r} is not a mask form")
    return kept, size, match[3] is not None


def _bits(kept: int, size: int) -> int:
    return max(1, math.ceil(math.log2(math.comb(size, kept))))


def _patterns(kept: int, size: int) -> Tensor:
    """All group patterns as integers, bit i for weight i, ascending: `[size choose kept]`."""
    numbers = torch.arange(1 << size)
    ones = (numbers.unsqueeze(1) >> torch.arange(size) & 1).sum(1)
    return numbers[ones == kept]


def _from_positions(packed: Tensor, count: int) -> Tensor:
    if packed.numel() % 4:
        raise ValueError(f"{packed.numel()} bytes do not divide into positions of 4 bytes")
    positions = packed.clone().view(torch.int32).long()
    if positions.numel() and (
        int(positions[0]) < 0 or int(positions[-1]) >= count or bool((positions.diff() <= 0).any())
    ):
        raise ValueError(f"the positions of zeros are not ascending integers below {count}")
    mask = torch.ones(count, dtype=torch.bool, device=packed.device)
    mask[positions] = False
    return mask
