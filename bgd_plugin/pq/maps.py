"""Moments of a convolution's unfolded inputs, from the inputs themselves.

Columns of unfolded inputs are channels seen from the kernel's offsets. The product of two of them, summed over all
positions, hardly depends on where in the kernel they are, only on how far they are apart: a kernel of 3×3 has 81 pairs
of offsets, and 13 distances but for the sign.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.pq.blocks import Geometry, padded

__all__ = ["Maps"]

_SUMMED = 50
"""Multiplications in the time in which a number of a result is added to another: these wait for memory."""
_STARTED = 1 << 19
"""Multiplications in the time in which one product of matrices, or one sum, starts."""
_MANY = 1 << 20
"""Samples of which the sums themselves are a small part of the work."""
_MOST_OFFSETS = 64
"""Of kernels with more, the places between edges are too many to go through."""

_Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Maps:
    """The padded inputs of a convolution with a stride of 1, in place of all its unfolded rows.

    Attributes:
        values: `[samples, *spatial, channels]`.
        kernel_size: one number per spatial dimension.
    """

    values: Tensor
    kernel_size: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, geometry: Geometry, most: int) -> Maps | None:
        """A copy, in single precision; None where rows are no more work, or the kernel steps, is dilated or grouped.

        Args:
            x: `[samples, C_in, *spatial]`.
            geometry: how the layer reads it.
            most: None, too, where there are more positions than this.
        """
        kernel, ones = geometry.kernel_size, (1,) * len(geometry.kernel_size)
        is_plain = geometry.stride == geometry.dilation == ones and geometry.groups == 1
        if not is_plain or not 1 < math.prod(kernel) <= _MOST_OFFSETS or x.ndim != len(ones) + 2 or not len(x):
            return None
        sizes = tuple(size + sum(pad) for size, pad in zip(x.shape[2:], geometry.padding, strict=True))
        spans = [size - k + 1 for size, k in zip(sizes, kernel, strict=True)]
        if min(spans) < 1 or len(x) * math.prod(spans) > most or not _is_less_work(_MANY, sizes, kernel, x.shape[1]):
            return None
        values = padded(x, geometry).movedim(1, -1)
        copy = torch.empty(values.shape, dtype=torch.float32, device=x.device)
        return cls(values=copy.copy_(values), kernel_size=kernel)

    @property
    def positions(self) -> int:
        """Rows of the unfolded inputs."""
        return len(self.values) * math.prod(s - k + 1 for s, k in zip(self._sizes, self.kernel_size, strict=True))

    @property
    def columns(self) -> int:
        """Columns of the unfolded inputs."""
        return self.values.shape[-1] * math.prod(self.kernel_size)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:-1])

    def fits(self, other: Maps) -> bool:
        """Whether both can be joined."""
        return self.kernel_size == other.kernel_size and self.values.shape[1:] == other.values.shape[1:]

    def parts(self, outputs: Tensor, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of a few samples at a time, and their outputs.

        Args:
            outputs: `[1, positions, n]`.
            positions: about so many at a time.

        Yields:
            `[1, some, columns]` and `[1, some, n]`.
        """
        per_sample = self.positions // len(self.values)
        step = max(1, positions // per_sample)
        for values, some in zip(
            torch.split(self.values, step), torch.split(outputs, step * per_sample, 1), strict=True
        ):
            yield Maps(values=values, kernel_size=self.kernel_size).rows(), some

    def joined(self, others: Sequence[Maps]) -> Maps:
        """These maps and others that fit, one after another."""
        return Maps(values=torch.cat([self.values, *(m.values for m in others)]), kernel_size=self.kernel_size)

    def shifted(self, channels: Tensor) -> Maps:
        """The maps less a value `[channels]`, padding included."""
        return Maps(values=self.values - channels, kernel_size=self.kernel_size)

    def rows(self) -> Tensor:
        """The unfolded inputs, `[1, positions, columns]`."""
        return torch.stack(self._seen(), dim=2).reshape(1, self.positions, self.columns)

    def means(self) -> Tensor:
        """Of each column, `[1, columns]`."""
        return torch.stack([rows.mean(0) for rows in self._seen()], dim=1).reshape(1, self.columns)

    def cross(self, outputs: Tensor) -> Tensor:
        """`rows.mT @ outputs`.

        Args:
            outputs: `[1, positions, n]`.

        Returns:
            `[1, columns, n]`.
        """
        parts = [rows.mT @ outputs[0] for rows in self._seen()]
        return torch.stack(parts, dim=1).reshape(1, self.columns, outputs.shape[2])

    def is_less_work(self) -> bool:
        """Whether `gram` takes less time than half of the products of all pairs of columns."""
        return _is_less_work(len(self.values), self._sizes, self.kernel_size, self.values.shape[-1])

    def gram(self) -> Tensor:
        """`rows.mT @ rows`.

        Offsets i and j of the kernel at position p see `values[p + i]` and `values[p + j]`: the sum over p of their
        products is that of `values[q] · values[q + j − i]` over a window of q. The windows of pairs with the same j − i
        are shifted by an offset and hold nearly the same places. What lies between any two of their edges is multiplied
        once.

        Returns:
            `[1, columns, columns]`.
        """
        offsets = _offsets(self.kernel_size)
        place, channels = {offset: index for index, offset in enumerate(offsets)}, self.values.shape[-1]
        gram = self.values.new_zeros(len(offsets), len(offsets), channels, channels)
        for apart in _distances(self.kernel_size):
            for cell, seeing in _cells(self._sizes, self.kernel_size, apart):
                there = [(start + x, end + x) for (start, end), x in zip(cell, apart, strict=True)]
                product = self._region(cell).mT @ self._region(there)
                for offset in seeing:
                    other = tuple(o + x for o, x in zip(offset, apart, strict=True))
                    gram[place[offset], place[other]] += product
        for first, second in itertools.combinations(range(len(offsets)), 2):
            gram[second, first] = gram[first, second].mT
        return gram.permute(2, 0, 3, 1).reshape(1, self.columns, self.columns)

    def _seen(self) -> list[Tensor]:
        """What each offset of the kernel sees, `[positions, channels]`."""
        spans = [s - k + 1 for s, k in zip(self._sizes, self.kernel_size, strict=True)]
        return [
            self._region([(o, o + span) for o, span in zip(offset, spans, strict=True)])
            for offset in _offsets(self.kernel_size)
        ]

    def _region(self, cell: Sequence[_Span]) -> Tensor:
        """A cell of all samples, `[positions, channels]`."""
        return self.values[(slice(None), *(slice(*span) for span in cell))].reshape(-1, self.values.shape[-1])


@functools.lru_cache(maxsize=4096)
def _is_less_work(samples: int, sizes: tuple[int, ...], kernel_size: tuple[int, ...], channels: int) -> bool:
    """Whether so many samples' Gram takes less time by distances than by all pairs of columns."""
    work, area = 0, channels * channels
    for apart in _distances(kernel_size):
        for cell, seeing in _cells(sizes, kernel_size, apart):
            products = samples * math.prod(end - start for start, end in cell)
            work += area * (products + _SUMMED * len(seeing)) + _STARTED * (1 + len(seeing))
    positions = samples * math.prod(s - k + 1 for s, k in zip(sizes, kernel_size, strict=True))
    return 2 * work < area * positions * len(_offsets(kernel_size)) ** 2


def _offsets(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """The offsets of a kernel, in the order of its weights."""
    return list(itertools.product(*map(range, kernel_size)))


def _distances(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """The distances j − i of two offsets, but for their sign."""
    ranges = [range(-kernel + 1, kernel) for kernel in kernel_size]
    return [apart for apart in itertools.product(*ranges) if apart >= (0,) * len(apart)]


def _cells(
    sizes: Sequence[int], kernel_size: Sequence[int], apart: Sequence[int]
) -> list[tuple[list[_Span], list[tuple[int, ...]]]]:
    """The places between edges of windows, and for each the offsets whose windows it is in.

    Args:
        sizes: of the maps.
        kernel_size: one number per spatial dimension.
        apart: the distance of two offsets.
    """
    dimensions = []
    for size, kernel, distance in zip(sizes, kernel_size, apart, strict=True):
        starts, span = range(max(0, -distance), kernel - max(0, distance)), size - kernel + 1
        edges = sorted({edge for start in starts for edge in (start, start + span)})
        dimensions.append(
            [(a, b, [s for s in starts if s <= a and b <= s + span]) for a, b in itertools.pairwise(edges)]
        )
    return [
        ([(a, b) for a, b, _ in cell], list(itertools.product(*(seeing for _, _, seeing in cell))))
        for cell in itertools.product(*dimensions)
    ]
