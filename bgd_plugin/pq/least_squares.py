"""Improve codebook and codes under a layer's whole input Gram, by steps that never raise the objective.

The objective is the error of the layer's outputs, tr((W − Ŵ) H (W − Ŵ)ᵀ), summed over groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.jit.sweep import can_sweep, refine_
from bgd_plugin.pq.feedback import diagonal_blocks, grouped, nearest
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.panels import Panels
from bgd_plugin.pq.powers import near_one

__all__ = ["output_objective", "refine_codes", "solve_codebook"]

_ROWS = 4096


@torch.no_grad()
def output_objective(
    weight: Tensor,
    codebook: Tensor,
    codes: Tensor,
    gram: Tensor,
    mask: Tensor | None = None,
) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ), summed in float64 from products in the weight's dtype.

    Args:
        weight: `[rows, columns]`.
        codebook: `[codebook_size, block_size]`.
        codes: int64 `[rows, blocks_per_row]`.
        gram: `[groups, columns, columns]` or, for one group, `[columns, columns]`.
        mask: bool `[rows, columns]`, false where Ŵ is zero; none if not given.
    """
    rows, grams = grouped(weight, gram)
    difference, unit = near_one(rows - masked(codebook[codes].to(rows).reshape(rows.shape), mask))
    grams, power = near_one(grams)
    grams = grams.to(rows)
    losses = [((part @ grams) * part).sum(2, dtype=torch.float64) for part in torch.split(difference, _ROWS, dim=1)]
    return float(torch.cat(losses, dim=1).sum()) * power * unit * unit


@torch.no_grad()
def solve_codebook(
    weight: Tensor,
    codes: Tensor,
    gram: Tensor,
    start: Tensor,
    *,
    iterations: int = 30,
    tolerance: float = 1e-6,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codebook that minimizes `output_objective` for fixed codes, by conjugate gradients from `start`.

    All codebook_size · block_size numbers are solved together, because H couples the blocks of a row. With S the
    linear map from a codebook to Ŵ, the normal equations are Sᵀ(S(C) H) = Sᵀ(W H): multiplying by the normal
    matrix means a decode, a product by H, and a sum over the blocks of each codeword; the matrix is never formed.
    Preconditioned by the mean diagonal block of H and each codeword's count. An unused codeword does not move.

    Args:
        weight: `[rows, columns]`; computed in its dtype.
        codes: int64 `[rows, blocks_per_row]`.
        gram: `[groups, columns, columns]` or `[columns, columns]`.
        start: `[codebook_size, block_size]`.
        iterations: maximum number.
        tolerance: stop when the preconditioned residual's squared norm has fallen by this factor.
        mask: bool `[rows, columns]`, false where Ŵ is zero; none if not given.

    Returns:
        `[codebook_size, block_size]`, in `start`'s dtype: `start` itself where the steps lower nothing; and
        (W − Ŵ) H with it, `[groups, rows_per_group, columns]`, where `refine_codes` starts.

    **Source**: Hestenes and Stiefel, J. Res. NBS 49 (1952), for the conjugate gradients.
    """
    rows, grams = grouped(weight, gram)
    grams = grams.to(rows)
    flat_codes, block_size = codes.flatten(), start.shape[1]

    def times_gram(codebook: Tensor) -> Tensor:
        """S(C) H, `[groups, rows_per_group, columns]`."""
        return masked(codebook[codes].to(rows).reshape(rows.shape), mask) @ grams

    def collect(product: Tensor) -> Tensor:
        """Sᵀ of it, `[codebook_size, block_size]`."""
        return torch.zeros_like(change).index_add_(0, flat_codes, masked(product, mask).reshape(-1, block_size))

    change = torch.zeros_like(start, dtype=rows.dtype)
    before = (rows - masked(start[codes].to(rows).reshape(rows.shape), mask)) @ grams
    after = before.clone()
    slope = collect(before)
    residual = slope.clone()
    precondition = _Preconditioner(grams, flat_codes, start)
    direction = precondition(residual)
    norm = first = float((residual * direction).sum())
    for _ in range(iterations):
        if not norm > tolerance * first:
            break
        product = times_gram(direction)
        image = collect(product)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        step = norm / curvature
        change += step * direction
        residual -= step * image
        after.sub_(product, alpha=step)
        conditioned = precondition(residual)
        previous, norm = norm, float((residual * conditioned).sum())
        direction = conditioned + norm / previous * direction
    # A change x lowers the objective, which is quadratic, by ⟨x, slope before + slope after⟩.
    lowered = float((change.double() * (slope.double() + residual.double())).sum())
    return ((start.to(change) + change).to(start.dtype), after) if lowered > 0 else (start.clone(), before)


class _Preconditioner:
    """(mean diagonal block of H)⁻¹ / count of each codeword: symmetric and positive, as conjugate gradients require."""

    def __init__(self, grams: Tensor, flat_codes: Tensor, start: Tensor) -> None:
        block_size = start.shape[1]
        mean = diagonal_blocks(grams, block_size).mean((0, 1)).double()
        level = mean.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        identity = torch.eye(block_size, dtype=torch.float64, device=grams.device)
        self._inverse: Tensor = torch.linalg.inv(mean / level + 1e-4 * identity).to(grams)
        self._counts = torch.bincount(flat_codes, minlength=start.shape[0]).clamp(min=1).unsqueeze(1).to(grams)

    def __call__(self, residual: Tensor) -> Tensor:
        conditioned: Tensor = residual @ self._inverse / self._counts
        return conditioned


@torch.no_grad()
def refine_codes(
    weight: Tensor,
    codebook: Tensor,
    codes: Tensor,
    gram: Tensor,
    mask: Tensor | None = None,
    slope: Tensor | None = None,
) -> tuple[Tensor, int]:
    """One sweep of coordinate descent: block by block, the best codeword of each row with its other blocks fixed.

    With E = W − Ŵ and G = E H, the best codeword for block I of a row is the one nearest, in the metric H_II, to
    ŵ_I + G_I H_II⁻¹; then the part of G that belongs to later blocks gets a rank-d update. Rows are independent, so all
    are updated at once. A row changes only if that lowers its loss: a step m does so by m (2 G_I − m H_II)ᵀ.

    Args:
        weight: `[rows, columns]`; computed in its dtype.
        codebook: `[codebook_size, block_size]`.
        codes: int64 `[rows, blocks_per_row]`.
        gram: `[groups, columns, columns]` or `[columns, columns]`, with positive definite diagonal blocks (damped).
        mask: bool `[rows, columns]`, false where Ŵ is zero; none if not given.
        slope: G, `[groups, rows_per_group, columns]`, of `solve_codebook`, which is overwritten; computed if None.

    Returns:
        the new codes, int64 `[rows, blocks_per_row]`, and the number of codes that changed.
    """
    rows, grams = grouped(weight, gram)
    block_size, words = codebook.shape[1], codebook.to(rows)
    own = diagonal_blocks(grams, block_size).double()
    roots = torch.linalg.cholesky(own)
    inverses, roots, own = (matrices.to(rows) for matrices in (torch.cholesky_inverse(roots), roots, own))
    grams = grams.to(rows)
    new = codes.reshape(*rows.shape[:2], -1).clone()
    if slope is None:
        slope = (rows - masked(words[new].reshape(rows.shape), mask)) @ grams
    panels = Panels(slope, grams, block_size)
    if mask is None and can_sweep(rows, words):
        turns = inverses @ roots
        for blocks in panels.spans():
            turn, root, square = (matrices[:, blocks] for matrices in (turns, roots, own))
            steps = refine_(new[:, :, blocks], *panels.part(blocks), turn, root, square, words)
            panels.change_beyond_(blocks, steps)
        found = new.flatten(0, 1)
        return found, int((found != codes).sum())
    kept = None if mask is None else mask.reshape(rows.shape)
    for block in range(new.shape[2]):
        here = slice(block * block_size, (block + 1) * block_size)
        here_kept = None if kept is None else kept[:, :, here]
        old = masked(words[new[:, :, block]], here_kept)
        choice = nearest(old + panels[block] @ inverses[:, block], roots[:, block], words, here_kept)
        moved = masked(words[choice], here_kept) - old
        lowered = (moved * (2 * panels[block] - moved @ own[:, block])).sum(2)
        better = lowered > 0  # nothing is lowered where the choice is the old one
        new[:, :, block] = torch.where(better, choice, new[:, :, block])
        panels.change_(block, torch.where(better.unsqueeze(2), moved, 0))
    found = new.flatten(0, 1)
    return found, int((found != codes).sum())
