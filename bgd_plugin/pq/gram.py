"""The Gram of a layer's inputs, with their means and their products with the wanted outputs: sums over positions.

Everything here is streamed: the sums add up over batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.support.processes import sum_, total

__all__ = ["MomentSums", "Moments"]

_ROUNDING = 1e-11
"""Relative to the squared mean, a variance below this is rounding error of float32."""
_COLUMNS = 512
"""Columns of a Gram that are computed at once."""
_WAITING = 1 << 16
"""Numbers, 256 KiB, that may wait to be summed even if the sums take less memory."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means over the same positions of a layer's student inputs x and its wanted (float network's) outputs y.

    A group's outputs are its rows of the weight. Use float64: `centred` takes differences.
    """

    gram: Tensor
    """`[groups, columns, columns]`, mean of x xᵀ."""
    mean: Tensor
    """`[groups, columns]`, mean of x."""
    cross: Tensor
    """`[groups, columns, rows_per_group]`, mean of x yᵀ."""
    output_mean: Tensor
    """`[groups, rows_per_group]`, mean of y."""

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor) -> Moments:
        """From complete inputs `[groups, positions, columns]` and outputs `[groups, positions, rows_per_group]`."""
        sums = MomentSums()
        sums.add_(inputs, outputs)
        return sums.means_()

    @classmethod
    def pooled(cls, first: Moments, second: Moments, share: float) -> Moments:
        """The moments of the union of two sets of positions; `share` (0 to 1) of them are in the first."""

        def mean(a: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(b, a, share)  # a weighted sum would allocate two more Grams

        return cls(
            gram=mean(first.gram, second.gram),
            mean=mean(first.mean, second.mean),
            cross=mean(first.cross, second.cross),
            output_mean=mean(first.output_mean, second.output_mean),
        )

    def through(self, weight: Tensor) -> Moments:
        """Moments with the outputs `y Wᵀ` in place of y; the result has a Gram of its own.

        Args:
            weight: `[rows, columns]`, groups' rows one after another.
        """
        groups, columns = self.output_mean.shape
        matrix = weight.double().reshape(groups, -1, columns).mT
        return Moments(
            gram=self.gram.clone(),
            mean=self.mean,
            cross=self.cross.double() @ matrix,
            output_mean=(self.output_mean.double().unsqueeze(1) @ matrix).squeeze(1),
        )

    def centred(self) -> tuple[Tensor, Tensor]:
        """The covariances of x with itself and with y, float64: what the weight has to fit if a bias fits the means.

        Returns:
            `[groups, columns, columns]` and `[groups, columns, rows_per_group]`.
        """
        copied = Moments(
            gram=self.gram.to(torch.float64, copy=True),
            mean=self.mean.double(),
            cross=self.cross.to(torch.float64, copy=True),
            output_mean=self.output_mean.double(),
        )
        return copied.centred_()

    def centred_(self) -> tuple[Tensor, Tensor]:
        """`centred`, of the same shapes, computed in place: `gram` and `cross` are overwritten, the means are kept."""
        mean, output_mean = self.mean.unsqueeze(2), self.output_mean.unsqueeze(1)
        self.gram.baddbmm_(mean, mean.mT, alpha=-1)
        self.gram.diagonal(dim1=1, dim2=2).add_(self.mean.square(), alpha=_ROUNDING)
        self.cross.baddbmm_(mean, output_mean, alpha=-1)
        return self.gram, self.cross


class MomentSums:
    """Moments accumulated piece by piece; the pieces are not kept.

    Small pieces wait for others, as each sum costs work on whole matrices; they take no more memory than the sums, or
    very little. The products of what is summed at once are
    summed in float32, relative to one typical position: where inputs hardly vary around a large mean, products of the
    inputs themselves would lose all their digits.
    """

    def __init__(self) -> None:
        self._count: float = 0
        self._sums: list[Tensor] = []
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    @property
    def count(self) -> float:
        """Positions so far, or the sum of their weights."""
        self._flush()
        return self._count

    @property
    def sums(self) -> list[Tensor]:
        """The sums over positions of the fields of `Moments`, in that order and shape; none before a piece."""
        self._flush()
        return self._sums

    def add_(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Add the moments of some positions.

        Args:
            inputs: `[groups, positions, columns]`.
            outputs: `[groups, positions, rows_per_group]`.
            weights: `[positions]`, how often each position counts; None: once. The same for all pieces: none, or some.
        """
        (groups, _, columns), rows = inputs.shape, outputs.shape[2]
        most = max(_WAITING, 2 * groups * columns * (columns + rows))  # what the sums take, in single precision
        if inputs.numel() + outputs.numel() < most:
            # copies: inputs may be views of values whose memory is used again as soon as the next batch is open
            inputs, outputs = inputs.clone(), outputs.clone()
        self._waiting.append((inputs, outputs, weights))
        if sum(x.numel() + y.numel() for x, y, _ in self._waiting) >= most:
            self._flush()

    def _flush(self) -> None:
        """Add the pieces that wait, all at once."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) > 1:
            inputs, outputs = torch.cat([x for x, _, _ in waiting], 1), torch.cat([y for _, y, _ in waiting], 1)
            weights = [w for _, _, w in waiting if w is not None]
            self._add_(inputs, outputs, torch.cat(weights) if weights else None)
        elif waiting:
            self._add_(*waiting[0])

    def _add_(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None) -> None:
        count = inputs.shape[1] if weights is None else float(weights.double().sum())
        first, first_output = (_typical(values, weights) for values in (inputs, outputs))
        inputs, outputs = inputs - first, outputs - first_output
        if weights is None:
            parts = (_gram(inputs), inputs.double().sum(1), inputs.mT @ outputs, outputs.double().sum(1))
        else:
            root, each = weights.sqrt().unsqueeze(1), weights.double().unsqueeze(1)
            cross = (inputs * root).mT @ (outputs * root)
            parts = (_gram(inputs * root), (inputs.double() * each).sum(1), cross, (outputs.double() * each).sum(1))
        self._count += count
        self._sums = self._sums or [torch.zeros_like(part, dtype=torch.float64) for part in parts]
        for so_far, part in zip(self._sums, parts, strict=True):
            so_far += part
        # (x + f)(y + g)ᵀ = xyᵀ + f(y + g)ᵀ + xgᵀ, summed, in double precision
        gram, mean, cross, output_mean = self._sums
        rest, output_rest = parts[1].unsqueeze(1), parts[3].unsqueeze(1)
        first, first_output = first.double(), first_output.double()
        gram.baddbmm_(first.mT, rest + count * first).baddbmm_(rest.mT, first)
        cross.baddbmm_(first.mT, output_rest + count * first_output).baddbmm_(rest.mT, first_output)
        mean += count * first.sum(1)
        output_mean += count * first_output.sum(1)

    def share_(self) -> None:
        """Sum over all processes; every process gets the result."""
        sum_(self.sums)
        self._count = total(self.count)

    def joined(self, other: MomentSums) -> MomentSums:
        """The sums over the positions of both."""
        result = MomentSums()
        result._count = self.count + other.count
        result._sums = [mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True)]
        return result

    def means_(self) -> Moments:
        """The moments, computed in place: the sums are overwritten."""
        gram, mean, cross, output_mean = (sums.div_(self.count or 1) for sums in self.sums)
        return Moments(gram=gram, mean=mean, cross=cross, output_mean=output_mean)


def _typical(values: Tensor, weights: Tensor | None) -> Tensor:
    """The first position, or the weighted mean, because a position of little weight may be far from all others.

    Returns:
        `[groups, 1, columns]`; zeros if there are no positions.
    """
    if weights is None or not len(weights):
        return values[:, :1].sum(1, keepdim=True)
    return torch.einsum("p,gpc->gc", weights / weights.sum(), values).unsqueeze(1)


def _gram(inputs: Tensor) -> Tensor:
    """`inputs.mT @ inputs`, some columns at a time: what lies below the diagonal is copied, not computed."""
    columns = inputs.shape[2]
    gram = inputs.new_empty(inputs.shape[0], columns, columns)
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        part = inputs[:, :, :end].mT @ inputs[:, :, start:end]
        gram[:, :end, start:end] = part
        gram[:, start:end, :start] = part[:, :start].mT
    return gram
