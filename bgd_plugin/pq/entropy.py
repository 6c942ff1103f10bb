"""Fit a layer to a number of bytes: levels and codes of a trellis whose codes are entropy coded in the file.

What is minimized is the error of the layer's outputs plus λ for each bit, with error feedback as in `pq.feedback`. The
step of the grid follows from λ, the costs of the codes from their frequencies, the levels from least squares; λ is
searched, on some of the rows first, until the stream takes the bytes that it may.

**Source**: Chou, Lookabaugh and Gray, "Entropy-constrained vector quantization", IEEE Trans. ASSP 37 (1989), for the
alternation; the step at high rate as in Gish and Pierce, IEEE Trans. Inf. Theory 14 (1968).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.encoding.stream import coded_bytes, overhead_bytes
from bgd_plugin.pq.feedback import damped, factors, grouped
from bgd_plugin.pq.least_squares import solve_codebook
from bgd_plugin.pq.powers import near_one, power_of_two
from bgd_plugin.pq.trellis import encode_trellis

__all__ = ["EntropyFit", "fit_entropy"]

_GRANULAR_GAIN = 1.26
"""Of the trellis: as many times the error of plain rounding with the same step."""
_LEAST_LEVELS, _MOST_LEVELS = 4, 256
_LEAST_ROWS, _SHARE_OF_ROWS = 96, 5
_TRIALS, _PASSES, _LAST_RESORTS = 4, 3, 12
_NEAR, _CLOSE = 0.01, 0.003
_MARGIN = 0.002
_MORE = 0.01
_LONGEST_STEP, _STEEPEST = 4.0, 4.0
_LEVEL_ITERATIONS = 12


@dataclass(frozen=True, kw_only=True)
class EntropyFit:
    """What `fit_entropy` found.

    Attributes:
        codebook: `[levels, 1]`, in the order of the trellis' grid, in the weight's dtype.
        codes: int64 `[rows, columns]`.
        size_bytes: of stream and codebook.
    """

    codebook: Tensor
    codes: Tensor
    size_bytes: int


@torch.no_grad()
def fit_entropy(
    weight: Tensor, gram: Tensor | None, most_bytes: int, *, level_bytes: int = 1, damping: float = 0.01
) -> EntropyFit:
    """Minimize Σ_groups tr((W − Ŵ) H (W − Ŵ)ᵀ) over the codes whose stream and codebook take at most `most_bytes`.

    Args:
        weight: `[rows, columns]`, the rows of each group contiguous.
        gram: `[groups, columns, columns]`, second moments of the inputs; None: the identity.
        most_bytes: never exceeded.
        level_bytes: bytes of a level in the file.
        damping: added to the Gram's diagonal, in units of its mean.

    Raises:
        ValueError: too few bytes, or NaN or Inf.
    """
    if not bool(torch.isfinite(weight).all()) or (gram is not None and not bool(torch.isfinite(gram).all())):
        raise ValueError("the weights or the inputs hold NaN or Inf")
    rows, unit = near_one(weight.float())
    task = _Task(rows, gram, level_bytes, damping)
    some = task.part(max(_LEAST_ROWS, len(weight) // _SHARE_OF_ROWS))
    best = _searched(task, some, most_bytes)
    codes, levels = best.codes.flatten(0, 1), best.levels
    first, last = _ends(codes, len(levels))
    return EntropyFit(
        codebook=(levels[first:last, None] * unit).to(weight.dtype), codes=codes - first, size_bytes=best.size_bytes
    )


class _Task:
    """Rows to be coded, and the metric in which their errors count."""

    def __init__(self, rows: Tensor, gram: Tensor | None, level_bytes: int, damping: float) -> None:
        self.level_bytes = level_bytes
        self.inverse: Tensor | None = None
        if gram is None:
            self.rows = rows.unsqueeze(0)
            self.hessian: Tensor | None = None
            self.metrics = torch.ones_like(self.rows[:, 0])
        else:
            self.rows, grams = grouped(rows, gram)
            hessian = damped(grams, damping)
            hessian /= power_of_two(hessian)
            self.hessian = hessian.float()
            metrics, inverse = factors(hessian, 1)
            self.metrics, self.inverse = metrics.flatten(1).float(), inverse.float()
        self.mean_metric = float(self.metrics.square().mean())
        self.scale = 1.0
        """Rows of the layer for each row here."""

    def part(self, rows: int) -> _Task:
        """The same with some of the rows, from all over each group."""
        per_group = max(1, -(-rows // len(self.rows)))
        step = self.rows.shape[1] // per_group
        if step < 2:
            return self
        result = object.__new__(_Task)
        vars(result).update(vars(self))
        result.rows = self.rows[:, ::step].contiguous()
        result.scale = self.rows.shape[1] / result.rows.shape[1]
        return result

    def size_bytes(self, codes: Tensor, size: int) -> int:
        """Of stream and codebook, if all rows of the layer are like these."""
        flat = codes.flatten(0, 1)
        first, last = _ends(flat, size)
        rows, columns, used = len(flat), flat.shape[1], last - first
        words = coded_bytes(flat - first, used) - overhead_bytes(rows, columns, used)
        overhead = overhead_bytes(round(rows * self.scale), columns, used)
        return overhead + math.ceil(words * self.scale) + self.level_bytes * used + 4

    def solved_levels(self, levels: Tensor, codes: Tensor) -> Tensor:
        """The levels by least squares; one without a code stays."""
        flat = self.rows.flatten(0, 1)
        if self.hessian is not None:
            own = codes.flatten(0, 1)
            start = levels[:, None]
            solved, _ = solve_codebook(flat, own, self.hessian, start, iterations=_LEVEL_ITERATIONS, tolerance=1e-9)
            return solved[:, 0]
        sums = torch.zeros_like(levels).index_add_(0, codes.flatten(), flat.flatten())
        counts = torch.bincount(codes.flatten(), minlength=len(levels))
        return torch.where(counts > 0, sums / counts.clamp(min=1), levels)


@dataclass(frozen=True, kw_only=True)
class _Coded:
    """Codes of a task's rows: `[groups, rows, columns]`, with the levels that suit them, and their bytes."""

    codes: Tensor
    levels: Tensor
    size_bytes: int


class _Coder:
    """A grid for one λ, in units of the squared error for each bit, with costs and levels that are learnt."""

    def __init__(self, task: _Task, log_rate: float) -> None:
        top = float(task.rows.abs().max())
        rate = 2.0**log_rate
        step = math.sqrt(12 * rate / (2 * math.log(2) * task.mean_metric) * _GRANULAR_GAIN) / 2
        step = max(step, top / (_MOST_LEVELS / 2 - 2), 1e-30)
        reach = max(2, math.ceil(top / step) + 1)
        places = torch.arange(-reach, reach + 1, device=task.rows.device)
        self.levels = places.float() * step
        self._log_rate = log_rate
        self._offset = -reach % 4
        self._context = (places & 1).bool()
        rounded = (task.rows / step).round().long().flatten() + reach
        self._bits = self._lengths(torch.bincount(rounded, minlength=len(places)))

    def coded(self, task: _Task, log_rate: float) -> _Coded:
        """Code a task's rows; costs and levels are learnt from the codes, for the next time.

        Another λ widens or narrows the grid: the costs alone would hardly change the bytes.
        """
        self.levels = self.levels * 2 ** ((log_rate - self._log_rate) / 2)
        self._log_rate = log_rate
        costs = 2.0**log_rate * self._bits
        codes = encode_trellis(task.rows, self.levels, self._offset, costs, task.metrics, task.inverse)
        self._bits = self._lengths(torch.bincount(codes.flatten(), minlength=len(self.levels)))
        self.levels = task.solved_levels(self.levels, codes)
        size = task.size_bytes(codes, len(self.levels))
        return _Coded(codes=codes, levels=self.levels, size_bytes=size)

    def _lengths(self, counts: Tensor) -> Tensor:
        """Bits of each code by its frequency in its quantizer; one that does not occur is not ruled out."""
        counts = counts.double() + 0.25
        totals = torch.where(self._context, counts[self._context].sum(), counts[~self._context].sum())
        return (totals / counts).log2().float()


def _searched(task: _Task, some: _Task, most_bytes: int) -> _Coded:
    """The codes that make the most of the bytes: λ is found on some rows, then corrected on all."""
    weights, aim = task.rows.numel(), most_bytes * (1 - _MARGIN)
    bits = max(0.1, 8 * most_bytes / weights - 0.1)
    power = float((task.rows.square().mean(1) * task.metrics.square()).mean())
    log_rate = math.log2(max(power, 1e-30) * 2 * math.log(2)) - 2 * bits
    points: list[tuple[float, float]] = []
    coder = _Coder(task, log_rate)
    for trial in range(_TRIALS):
        coder = _Coder(task, log_rate)
        coder.coded(some, log_rate)
        size = coder.coded(some, log_rate).size_bytes
        points.append((log_rate, size))
        if abs(size / aim - 1) < _NEAR or trial + 1 == _TRIALS:
            break
        log_rate = _next(points, aim, weights)
    log_rate, points = _next(points, aim, weights), points if task is some else []
    best: _Coded | None = None
    for tries in range(_PASSES + _LAST_RESORTS):
        found = coder.coded(task, log_rate)
        points.append((log_rate, found.size_bytes))
        if found.size_bytes <= most_bytes and (best is None or found.size_bytes > best.size_bytes):
            best = found
        if best is not None and (tries + 1 >= _PASSES or best.size_bytes > most_bytes * (1 - 2 * _CLOSE)):
            return best
        more = _MORE * 2 ** (tries - _PASSES) if best is None and tries >= _PASSES else 0.0
        log_rate = _next(points, aim, weights) + more
    raise ValueError(f"{most_bytes} bytes are too few for {weights} weights")


def _next(points: list[tuple[float, float]], aim: float, weights: int) -> float:
    """The logarithm of λ at which the bytes are expected to be right; at high rate a bit less makes it four times λ."""
    at, size = points[-1]
    slope = usual = -16.0 / weights
    if len(points) > 1:
        before, other = points[-2]
        if abs(size - other) > 1e-4 * aim and (at - before) * (size - other) < 0:
            slope = max(_STEEPEST * usual, (at - before) / (size - other))  # levels may keep the bytes for a while
    step = (aim - size) * slope
    return at + max(-_LONGEST_STEP, min(_LONGEST_STEP, step))


def _ends(codes: Tensor, size: int) -> tuple[int, int]:
    """The first code in use, and the one after the last: four codes at least."""
    first, last = int(codes.min()), int(codes.max()) + 1
    last = min(size, max(last, first + _LEAST_LEVELS))
    return min(first, last - _LEAST_LEVELS), last
