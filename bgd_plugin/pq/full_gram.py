"""Fit a layer's codebook and codes to its whole input Gram: start, error feedback, least squares, coordinate
descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import damped, diagonal_blocks, encode_damped, grouped
from bgd_plugin.pq.least_squares import output_objective, refine_codes, solve_codebook
from bgd_plugin.pq.masked import fit_masked
from bgd_plugin.pq.positions import position_codebook, positions_as_groups
from bgd_plugin.pq.powers import near_one, power_of_two

__all__ = ["FullFit", "fit_full"]

_START_ITERATIONS = 20
"""Iterations of k-means under the pooled metric, on a sample."""
_START_BLOCKS = 128
"""Blocks in that sample for each codeword."""
_POSITION_ITERATIONS = 5
"""Iterations that follow on all blocks, under the positions' own metrics."""
_SOLVE_ITERATIONS = 2
_SOLVE_TOLERANCE = 1e-2
"""Conjugate gradients of a round's codebook: the codes move afterwards, and a more exact solution gains nothing."""
_STILL = 1e-4
"""The fit stops after a round that lowers the objective by less than this fraction."""


@dataclass(frozen=True, kw_only=True)
class FullFit:
    """A fitted codebook and its codes."""

    codebook: Tensor
    """`[codebook_size, block_size]`, the weight's dtype."""
    codes: Tensor
    """int64 `[rows, blocks_per_row]`."""
    notes: tuple[str, ...]
    """Warnings about the fit."""


@torch.no_grad()
def fit_full(
    weight: Tensor,
    gram: Tensor,
    heldout_gram: Tensor | None,
    codebook_size: int,
    block_size: int,
    *,
    damping: float = 0.01,
    rounds: int = 4,
    mask: Tensor | None = None,
    generator: torch.Generator,
) -> FullFit:
    """Minimize Σ_groups tr((W − Ŵ) H (W − Ŵ)ᵀ) over one codebook for the layer and all codes.

    Start with k-means under each block position's own metric, encode with error feedback, then repeat up to `rounds`
    times: solve the codebook by least squares, then sweep the codes by coordinate descent. With few rows this overfits
    the calibration set, so the point with the lowest loss on held-out inputs is returned, and the fit stops after a
    round in which that loss rose.

    Args:
        weight: `[rows, columns]`, the rows of each group contiguous; computed in float64 if float64, else in float32.
        gram: `[groups, columns, columns]`, or `[columns, columns]` for one group: second moments of the fitted inputs.
        heldout_gram: the same for held-out inputs, of the same shape; None: choose by the fitted objective.
        codebook_size: k, at most the number of blocks.
        block_size: d.
        damping: added to the Gram's diagonal, as a factor of its mean. With fewer positions than columns it must be
            large: about 1.0 for a classifier layer and a few hundred images.
        rounds: maximum number of rounds of least squares and coordinate descent.
        mask: bool `[rows, columns]`, false where the decoded weight is zero; none if not given.
        generator: draws the initial codewords.

    Raises:
        ValueError: incompatible shapes, fewer blocks than codewords, NaN or Inf.
    """
    rows, grams = grouped(weight, gram)
    _check(rows, grams, block_size)
    rows, unit = near_one(rows if rows.dtype == torch.float64 else rows.float())
    flat = rows.flatten(0, 1)
    hessian = damped(grams, damping)
    hessian = hessian.div_(power_of_two(hessian)).to(rows)
    codebook = _start(rows, hessian, mask, codebook_size, block_size, generator)
    codes = encode_damped(flat, codebook, hessian, mask)
    heldout = None if heldout_gram is None else grouped(weight, heldout_gram)[1]
    trail = _Trail(flat, hessian if heldout is None else heldout, mask)
    trail.add(codebook, codes)
    for _ in range(rounds):
        codebook, slope = solve_codebook(
            flat,
            codes,
            hessian,
            codebook,
            iterations=_SOLVE_ITERATIONS,
            tolerance=_SOLVE_TOLERANCE,
            mask=mask,
        )
        trail.add(codebook, codes)
        codes, changed = refine_codes(flat, codebook, codes, hessian, mask, slope)
        trail.add(codebook, codes)
        if not changed or trail.is_done():
            break
    codebook, codes = trail.best
    return FullFit(
        codebook=(codebook * unit).to(weight.dtype),
        codes=codes,
        notes=(*(() if heldout is None else trail.notes()), *_notes(codes, codebook_size, grams)),
    )


class _Trail:
    """The points of a fit, their losses, and the best point.

    Args:
        weight: `[rows, columns]`.
        gram: of the inputs that decide, `[groups, columns, columns]`.
        mask: see `fit_full`.

    Attributes:
        history: the objective after error feedback, then after each half round.
        chosen: index of the best point.
        best: its codebook and codes.
    """

    def __init__(self, weight: Tensor, gram: Tensor, mask: Tensor | None = None) -> None:
        gram, self._power = near_one(gram)
        self._weight, self._gram, self._mask = weight, gram.to(weight), mask
        self.history: list[float] = []
        self.chosen = -1
        self.best: tuple[Tensor, Tensor]

    def add(self, codebook: Tensor, codes: Tensor) -> None:
        """Add a point."""
        loss = output_objective(self._weight, codebook, codes, self._gram, self._mask)
        self.history.append(self._power * loss)
        if self.chosen < 0 or self.history[-1] < self.history[self.chosen]:
            self.chosen, self.best = len(self.history) - 1, (codebook, codes)

    def notes(self) -> tuple[str, ...]:
        """What was taken back: the points are error feedback, then the codebook and the codes of each round."""
        if self.chosen == len(self.history) - 1:
            return ()
        number, is_codes = (self.chosen + 1) // 2, self.chosen % 2 == 0
        kept = f"round {number}'s {'codes' if is_codes else 'codebook'}" if number else "error feedback"
        return (f"kept the result of {kept}: later steps raised the error on held-out inputs",)

    def is_done(self) -> bool:
        """Whether the last round gained almost nothing, or lost."""
        return self.history[-1] > self.history[-3] * (1 - _STILL)


def _start(
    rows: Tensor,
    grams: Tensor,
    mask: Tensor | None,
    codebook_size: int,
    block_size: int,
    generator: torch.Generator,
) -> Tensor:
    """K-means under the pooled metric, then some iterations under each position's own metric.

    Returns:
        `[codebook_size, block_size]`.
    """
    positions, metrics = positions_as_groups(rows, diagonal_blocks(grams, block_size))
    if mask is not None:
        kept, _ = positions_as_groups(mask.reshape(rows.shape), diagonal_blocks(grams, block_size))
        return fit_masked(positions, metrics, kept, codebook_size, 2 * _START_ITERATIONS, generator=generator)[0]
    sample = _sample(positions, _START_BLOCKS * codebook_size, generator)
    rounds = _START_ITERATIONS if block_size > 1 else 1  # single weights start well spread
    start = fit_em(sample, metrics.mean(0), codebook_size, rounds, generator=generator, compiled=True).codebook
    return position_codebook(positions, metrics, start, _POSITION_ITERATIONS)


def _sample(positions: Tensor, blocks: int, generator: torch.Generator) -> Tensor:
    """Some rows of all positions, `[positions, rows, d]`: at least `blocks` blocks, or all that there are."""
    rows = -(-blocks // len(positions))
    if rows >= positions.shape[1]:
        return positions
    chosen = torch.randperm(positions.shape[1], generator=generator, device=generator.device)[:rows]
    return positions[:, chosen.to(positions.device)]


def _check(rows: Tensor, grams: Tensor, block_size: int) -> None:
    if block_size < 1 or rows.shape[2] % block_size:
        raise ValueError(f"{rows.shape[2]} weights per row do not divide into blocks of {block_size}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the weights hold NaN or Inf")
    if not bool(torch.isfinite(grams).all()):
        raise ValueError("the inputs hold NaN or Inf")


def _notes(codes: Tensor, codebook_size: int, grams: Tensor) -> tuple[str, ...]:
    notes = []
    used = int(torch.bincount(codes.flatten(), minlength=codebook_size).count_nonzero())
    if used < codebook_size:
        notes.append(f"{codebook_size - used} of {codebook_size} codewords are not used")
    power = grams.diagonal(dim1=1, dim2=2)
    silent = int((power <= torch.finfo(torch.float32).eps * power.mean()).sum())
    if silent:  # of a Gram around the mean: constant
        notes.append(f"{silent} of {power.numel()} input columns are constant")
    return tuple(notes)
