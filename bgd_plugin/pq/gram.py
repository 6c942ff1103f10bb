"""The covariance of a layer's inputs, their means, and their covariance with the wanted outputs, over all positions.

Everything here is streamed: moments add up over batches and processes. Second moments are kept around the means, where
single precision is enough: products of the inputs themselves would lose all their digits where inputs hardly vary
around a large mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.pq.maps import Maps
from bgd_plugin.support.processes import sum_, total

__all__ = ["MomentSums", "Moments"]

_ROUNDING = 1e-11
"""Relative to the squared mean, a variance below this is rounding error of float32."""
_COLUMNS = 192
"""Columns of a Gram that are computed at once."""
_WAITING = 1 << 16
"""Numbers, 256 KiB, that may wait to be summed even if the sums take less memory."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Moments over the same positions of a layer's student inputs x and its wanted (float network's) outputs y.

    A group's outputs are its rows of the weight. Covariances have the inputs' dtype, means are float64.
    """

    covariance: Tensor
    """`[groups, columns, columns]`, mean of (x − E x)(x − E x)ᵀ."""
    mean: Tensor
    """`[groups, columns]`, mean of x."""
    cross: Tensor
    """`[groups, columns, rows_per_group]`, mean of (x − E x)(y − E y)ᵀ."""
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
        apart, outputs_apart = first.mean - second.mean, first.output_mean - second.output_mean
        between = share * (1 - share)
        return cls(
            covariance=_add_outer_(torch.lerp(second.covariance, first.covariance, share), between * apart, apart),
            mean=torch.lerp(second.mean, first.mean, share),
            cross=_add_outer_(torch.lerp(second.cross, first.cross, share), between * apart, outputs_apart),
            output_mean=torch.lerp(second.output_mean, first.output_mean, share),
        )

    def through(self, weight: Tensor) -> Moments:
        """Moments with the outputs `y Wᵀ` in place of y.

        Args:
            weight: `[rows, columns]`, groups' rows one after another.
        """
        groups, columns = self.output_mean.shape
        matrix = weight.reshape(groups, -1, columns).mT
        return Moments(
            covariance=self.covariance,
            mean=self.mean,
            cross=self.cross @ matrix.to(self.cross),
            output_mean=(self.output_mean.unsqueeze(1) @ matrix.double()).squeeze(1),
        )

    def around_mean(self) -> tuple[Tensor, Tensor]:
        """`covariance` and `cross`: what the weight has to fit if a bias or a batch norm fits the means.

        Returns:
            `[groups, columns, columns]` and `[groups, columns, rows_per_group]`, which others may hold, too.
        """
        return self.covariance, self.cross

    def around_zero(self) -> tuple[Tensor, Tensor]:
        """The means of x xᵀ and x yᵀ: what the weight has to fit if nothing else fits the means.

        Returns:
            `[groups, columns, columns]` and `[groups, columns, rows_per_group]`.
        """
        return (
            _add_outer_(self.covariance.clone(), self.mean, self.mean),
            _add_outer_(self.cross.clone(), self.mean, self.output_mean),
        )


class MomentSums:
    """Moments accumulated piece by piece; the pieces are not kept.

    Small pieces wait for others, as each sum costs work on whole matrices; they take no more memory than the sums, or
    very little. What is summed at once is summed around its own mean.

    **Source**: Chan, Golub and LeVeque, The American Statistician 37 (1983), for the moments of a union.
    """

    def __init__(self) -> None:
        self._count: float = 0
        self._means: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._maps: list[tuple[Maps, Tensor]] = []

    @property
    def count(self) -> float:
        """Positions so far, or the sum of their weights."""
        self._flush()
        return self._count

    @property
    def sums(self) -> list[Tensor]:
        """The sums over positions of `covariance` and `cross` of `Moments`, in their shapes; none before a piece."""
        self._flush()
        return self._sums

    @property
    def squares(self) -> list[Tensor]:
        """What is not finite where values or squares of inputs are not: `sums`, the squared means, the outputs' means.

        Of the shapes of `Moments`' fields, in their order but for `cross`, which is the second; in the sums' dtype.
        """
        sums = self.sums
        return [*sums, self._means[0].to(sums[0]).square(), self._means[1].to(sums[0])] if sums else []

    def add_(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Add the moments of some positions.

        Args:
            inputs: `[groups, positions, columns]`.
            outputs: `[groups, positions, rows_per_group]`.
            weights: `[positions]`, how often each position counts; None: once. The same for all pieces: none, or some.
        """
        (groups, _, columns), rows = inputs.shape, outputs.shape[2]
        most = max(_WAITING, 2 * groups * columns * (columns + rows))  # twice what the sums take
        if inputs.numel() + outputs.numel() < most:
            # copies: inputs may be views of values whose memory is used again as soon as the next batch is open
            inputs, outputs = inputs.clone(), outputs.clone()
        self._waiting.append((inputs, outputs, weights))
        if sum(x.numel() + y.numel() for x, y, _ in self._waiting) >= most:
            self._flush()

    def add_maps_(self, maps: Maps, outputs: Tensor) -> None:
        """Add the moments of all positions of a convolution's inputs.

        Args:
            maps: of one group.
            outputs: `[1, positions, rows_per_group]`.
        """
        if self._maps and not maps.fits(self._maps[0][0]):
            self._flush()
        self._maps.append((maps, outputs.clone()))
        columns, rows = maps.columns, outputs.shape[2]
        waiting = sum(m.values.numel() + y.numel() for m, y in self._maps)
        if waiting >= max(_WAITING, 2 * columns * (columns + rows)):
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
        if self._maps:
            first, *others = (maps for maps, _ in self._maps)
            wanted = torch.cat([y for _, y in self._maps], 1)
            self._maps = []
            self._add_all_(first.joined(others), wanted)

    def _add_all_(self, maps: Maps, outputs: Tensor) -> None:
        """Add the moments of all positions of some maps, computed around their own mean."""
        if not maps.is_less_work():
            for inputs, some in maps.parts(outputs, 2 * (maps.columns + outputs.shape[2])):
                self._add_(inputs, some, None)
            return
        count, first = maps.positions, maps.values.flatten(0, -2).mean(0)
        maps, (y, first_output, output_rest) = maps.shifted(first), _centred(outputs, None, maps.positions)
        firsts = [first.repeat_interleave(maps.columns // len(first)).unsqueeze(0), first_output]
        self._add_centred_(count, firsts, [maps.means(), output_rest], [maps.gram(), maps.cross(y)])

    def _add_(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None) -> None:
        """Add the moments of some positions, computed around their own mean."""
        count = inputs.shape[1] if weights is None else float(weights.double().sum())
        roots = None if weights is None else weights.sqrt().to(inputs).unsqueeze(1)
        (x, first, rest), (y, first_output, output_rest) = (_centred(v, roots, count) for v in (inputs, outputs))
        self._add_centred_(count, [first, first_output], [rest, output_rest], [_gram(x), x.mT @ y])

    def _add_centred_(self, count: float, firsts: list[Tensor], rests: list[Tensor], sums: list[Tensor]) -> None:
        """Add sums of products of values less `firsts`, whose means are `rests`."""
        for part, other in zip(sums, rests, strict=True):
            _add_outer_(part, -count * rests[0], other)
        self._join_(count, [first.double() + rest for first, rest in zip(firsts, rests, strict=True)], sums)

    def _join_(self, count: float, means: list[Tensor], sums: list[Tensor]) -> None:
        """Add moments of other positions; `sums` is kept or read, not both."""
        if not self._sums:
            self._count, self._means, self._sums = count, means, sums
            return
        whole = self._count + count
        share = count / whole if whole else 0.0
        apart = [theirs - mine for mine, theirs in zip(self._means, means, strict=True)]
        for mine, theirs, other in zip(self._sums, sums, apart, strict=True):
            _add_outer_(mine.add_(theirs), self._count * share * apart[0], other)
        self._means = [mine + share * other for mine, other in zip(self._means, apart, strict=True)]
        self._count = whole

    def share_(self) -> None:
        """Sum over all processes; every process gets the result."""
        self._flush()
        whole = total(self._count)
        means = [self._count / (whole or 1) * mean for mean in self._means]
        sum_(means)
        apart = [mine - mean for mine, mean in zip(self._means, means, strict=True)]
        if any(bool(other.any()) for other in apart):
            for mine, other in zip(self._sums, apart, strict=True):
                _add_outer_(mine, self._count * apart[0], other)
        sum_(self._sums)
        self._means, self._count = means, whole

    def joined(self, other: MomentSums) -> MomentSums:
        """The sums over the positions of both."""
        result = MomentSums()
        for one in (self, other):
            one._flush()
            result._join_(one._count, one._means, [part.clone() for part in one._sums])
        return result

    def means_(self) -> Moments:
        """The moments, computed in place: the sums are overwritten."""
        covariance, cross = (sums.div_(self._count or 1) for sums in self.sums)
        mean, output_mean = self._means
        covariance.diagonal(dim1=1, dim2=2).add_(mean.square().to(covariance), alpha=_ROUNDING)
        return Moments(covariance=covariance, mean=mean, cross=cross, output_mean=output_mean)


def _centred(values: Tensor, roots: Tensor | None, count: float) -> tuple[Tensor, Tensor, Tensor]:
    """Values less their mean, times the roots of their weights; this mean; and what rounding has left of the mean.

    Args:
        values: `[groups, positions, columns]`.
        roots: `[positions, 1]`; None: all weigh 1.
        count: sum of the weights.

    Returns:
        of the values' shape, and twice `[groups, columns]`; zeros if there are no positions.
    """

    def mean_of(rooted: Tensor) -> Tensor:
        summed = rooted.sum(1) if roots is None else (roots.mT @ rooted).squeeze(1)
        return summed / (count or 1)

    first = mean_of(values if roots is None else values * roots)
    centred = values - first.unsqueeze(1)
    if roots is not None:
        centred *= roots
    return centred, first, mean_of(centred)


def _add_outer_(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`matrices` `[groups, m, n]` plus the outer products of `left` `[groups, m]` and `right` `[groups, n]`."""
    return matrices.baddbmm_(left.to(matrices).unsqueeze(2), right.to(matrices).unsqueeze(1))


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
