"""Rate-distortion curve of a weight: quick fits at a few codebook sizes, interpolated between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import cholesky, nearest
from bgd_plugin.pq.positions import position_codebook

__all__ = [
    "EntropyCurve",
    "QuickFit",
    "RateCurve",
    "entropy_curve",
    "largest_codebook",
    "quick_fit",
    "quick_fits",
    "rate_curve",
    "sampled_positions",
]

_START_ITERATIONS = 6
_ITERATIONS = 2
_STEPS = tuple(2.0 ** (2 - i / 2) for i in range(13))
"""Of the curve of entropy-coded codes, in root mean squares."""
_TRELLIS_GAIN = 1.22
"""By which a trellis of eight states lowers the error of an entropy-coded scalar quantizer."""


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """Error as a function of the codebook size, for one block size.

    Interpolated linearly in log-log between fitted sizes; extrapolated by the high-resolution law, error ~ k^(−2/d).

    Attributes:
        block_size: d.
        points: pairs (codebook size, error), sizes ascending.

    **Source**: Zador, "Asymptotic quantization error of continuous signals", IEEE Trans. Inf. Theory 28 (1982).
    """

    block_size: int
    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, block_size: int, fits: Mapping[int, QuickFit]) -> RateCurve:
        """The curve through quick fits, by their codebook sizes, ascending; the error is forced not to rise.

        Args:
            block_size: d.
            fits: at least one.
        """
        points: list[tuple[int, float]] = []
        for size, fit in fits.items():
            points.append((size, min(fit.error, points[-1][1]) if points else fit.error))
        return cls(block_size=block_size, points=tuple(points))

    def error(self, codebook_size: int) -> float:
        """The error at a codebook size, in the unit of `points`."""
        below = [p for p in self.points if p[0] <= codebook_size]
        above = [p for p in self.points if p[0] >= codebook_size]
        if below and above:
            (k0, e0), (k1, e1) = below[-1], above[0]
            if k0 == k1 or not e0 > 0 or not e1 > 0:
                return e0
            share = math.log(codebook_size / k0) / math.log(k1 / k0)
            return float(e0 ** (1 - share) * e1**share)
        k0, e0 = below[-1] if below else above[0]
        return float(e0 * (k0 / codebook_size) ** (2 / self.block_size))


@dataclass(frozen=True, kw_only=True)
class EntropyCurve:
    """Error as a function of the bits for each weight, where codes are entropy coded.

    Its logarithm is interpolated linearly; beyond the last point each bit divides it by four.

    Attributes:
        points: pairs (bits, error), bits ascending.
    """

    points: tuple[tuple[float, float], ...]

    def error(self, bits: float) -> float:
        """The error at a number of bits, in the unit of `points`."""
        below = [p for p in self.points if p[0] <= bits] or [self.points[0]]
        above = [p for p in self.points if p[0] > bits]
        (b0, e0) = below[-1]
        if not above or not e0 > 0 or not above[0][1] > 0:
            return e0 * 4.0 ** (b0 - bits) if not above else e0
        (b1, e1) = above[0]
        share = min(1.0, max(0.0, (bits - b0) / (b1 - b0))) if b1 > b0 else 0.0
        return float(e0 ** (1 - share) * e1**share)


@dataclass(frozen=True, kw_only=True)
class QuickFit:
    """A codebook `[codebook_size, d]` after a few iterations, and its mean error per weight."""

    codebook: Tensor
    error: float


@torch.no_grad()
def entropy_curve(blocks: Tensor, metrics: Tensor) -> EntropyCurve:
    """Mean error per weight and bits of entropy-coded codes, for steps of several lengths.

    Each weight is rounded to the nearer of two multiples of the step in error and bits, without feedback; a trellis
    lowers the error by the same factor at every rate.

    Args:
        blocks: `[positions, rows, 1]`.
        metrics: `[positions, 1, 1]`.
    """
    weights, metric = blocks.squeeze(2).double(), metrics.reshape(-1, 1).double()
    mean_metric = float(metric.mean())
    power = float((metric * weights.square()).mean())
    points = {0.0: power}
    for factor in _STEPS if power > 0 else ():
        step = factor * math.sqrt(power / mean_metric)
        rate = 2 * math.log(2) / 12 * mean_metric * step**2
        codes = (weights / step).round()
        lower = codes - codes.sign()
        bits = _code_lengths(codes)
        cost, other = ((metric * (weights - step * c).square() + rate * bits(c)) for c in (codes, lower))
        codes = torch.where(other < cost, lower, codes)
        error = float((metric * (weights - step * codes).square()).mean()) / _TRELLIS_GAIN
        entropy = float(_code_lengths(codes)(codes).mean())
        if entropy > max(points) and error < min(points.values()):
            points[entropy] = error
    return EntropyCurve(points=tuple(sorted(points.items())))


def _code_lengths(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """The bits that a code is worth by its frequency among `codes`; half a time is added to each."""
    reach = int(codes.abs().max())
    counts = torch.bincount((codes + reach).long().flatten(), minlength=2 * reach + 1).double() + 0.5
    lengths = (counts.sum() / counts).log2()
    return lambda some: lengths[(some + reach).long()]


def largest_codebook(blocks: int, block_size: int = 0) -> int:
    """The largest power of two strictly below a quarter of the blocks; 0 if there is none.

    Blocks that are meant to be single weights (`block_size` 1) may have a codeword each: the smallest power of two that
    gives them one, at least 2.
    """
    if block_size == 1:
        return int(2 ** max(1, math.ceil(math.log2(blocks))))
    return int(2 ** (math.ceil(math.log2(blocks / 4)) - 1)) if blocks > 4 else 0


@torch.no_grad()
def quick_fit(blocks: Tensor, metrics: Tensor, codebook_size: int, *, generator: torch.Generator) -> QuickFit:
    """A rough fit: k-means under the mean metric, then a few iterations under each position's own metric.

    Args:
        blocks: `[positions, rows, d]`.
        metrics: `[positions, d, d]`, symmetric, positive definite: the weight of an error at each position.
        codebook_size: k, at most the number of blocks.
        generator: draws the initial codewords.
    """
    rounds = _START_ITERATIONS if blocks.shape[2] > 1 else _ITERATIONS  # single weights start well spread
    start = fit_em(blocks, metrics.mean(0), codebook_size, rounds, generator=generator, compiled=True).codebook
    codebook = position_codebook(blocks, metrics, start, _ITERATIONS)
    codes = nearest(blocks, cholesky(metrics.double()).to(blocks), codebook)
    difference = blocks - functional.embedding(codes, codebook)
    error = float(((difference @ metrics.to(difference)) * difference).sum(dtype=torch.float64))
    return QuickFit(codebook=codebook, error=error / blocks.numel())


def quick_fits(
    blocks: Tensor, metrics: Tensor, codebook_sizes: Sequence[int], *, generator: torch.Generator
) -> dict[int, QuickFit]:
    """Quick fits by codebook size.

    Args:
        blocks: `[positions, rows, d]`.
        metrics: `[positions, d, d]`.
        codebook_sizes: ascending.
        generator: draws the initial codewords.
    """
    return {size: quick_fit(blocks, metrics, size, generator=generator) for size in codebook_sizes}


def rate_curve(
    blocks: Tensor, metrics: Tensor, codebook_sizes: Sequence[int], *, generator: torch.Generator
) -> RateCurve:
    """Mean error per weight at some codebook sizes; curves of different block sizes are comparable.

    Args:
        blocks: `[positions, rows, d]`.
        metrics: `[positions, d, d]`.
        codebook_sizes: ascending.
        generator: draws the initial codewords.
    """
    return RateCurve.of(blocks.shape[2], quick_fits(blocks, metrics, codebook_sizes, generator=generator))


def sampled_positions(blocks: Tensor, metrics: Tensor, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random sample of the positions with about `limit` blocks in all; all positions if there are fewer.

    Args:
        blocks: `[positions, rows, d]`.
        metrics: `[positions, d, d]`.
        limit: blocks to keep; if one position has more, its rows are sampled as well.
        generator: draws the sample.

    Returns:
        the sampled blocks `[n, m, d]` and their metrics `[n, d, d]`.
    """
    positions, rows = blocks.shape[:2]
    if rows > limit:
        order = torch.randperm(rows, generator=generator, device=generator.device)
        blocks = blocks[:, order[:limit].sort().values.to(blocks.device)]
    keep = max(1, limit // blocks.shape[1])
    if positions <= keep:
        return blocks, metrics
    order = torch.randperm(positions, generator=generator, device=generator.device)
    chosen = order[:keep].sort().values.to(blocks.device)
    return blocks[chosen], metrics[chosen]
