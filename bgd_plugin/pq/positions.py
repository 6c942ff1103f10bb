"""K-means in which each block position has a metric of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.pq.feedback import nearest
from bgd_plugin.pq.line import settled_on_a_line

__all__ = ["position_codebook", "positions_as_groups"]

_RELAXATION = 1.8
"""Codewords move so many times as far as to the best place for their members: between 1 and 2 this never raises the
objective, and it comes to rest sooner."""
_ON_A_LINE = 10
"""Iterations on sorted blocks of one weight for each of those on others."""


def positions_as_groups(rows: Tensor, metrics: Tensor) -> tuple[Tensor, Tensor]:
    """Treat each block position of each group as a group of its own, with rows of one block.

    Args:
        rows: `[groups, rows_per_group, columns]`.
        metrics: `[groups, blocks_per_row, d, d]`.

    Returns:
        blocks `[groups · blocks_per_row, rows_per_group, d]` and metrics `[groups · blocks_per_row, d, d]`.
    """
    blocks = rows.reshape(*rows.shape[:2], -1, metrics.shape[3]).transpose(1, 2)
    return blocks.flatten(0, 1), metrics.flatten(0, 1)


@torch.no_grad()
def position_codebook(blocks: Tensor, metrics: Tensor, start: Tensor, iterations: int) -> Tensor:
    """K-means with one metric per position p: min Σ_p Σ_v (v − c_a)ᵀ H_p (v − c_a).

    Assign each block to its nearest codeword under H_p, then solve each codeword by least squares over its members,
    d equations: (Σ_members H_p) c = Σ_members H_p v. Neither step raises the objective, except for a ridge of 1e-6
    that holds a codeword in place in directions absent from its members' inputs. A codeword without members does not
    move. All steps but the last go further than to the solution (over-relaxation). This initializes the full fit.
    Blocks of one weight are sorted (`settled_on_a_line`), and ten times as many iterations cost less.

    Args:
        blocks: `[positions, rows_per_position, d]`.
        metrics: `[positions, d, d]`, symmetric, positive definite.
        start: `[codebook_size, d]`.
        iterations: number of iterations.

    Returns:
        `[codebook_size, d]`.
    """
    codebook, metrics = start.to(blocks), metrics.double()
    if blocks.shape[2] == 1:
        weights, rounds = metrics.flatten().unsqueeze(1).expand(blocks.shape[:2]), _ON_A_LINE * iterations
        return settled_on_a_line(blocks.squeeze(2), weights, codebook.squeeze(1), rounds).unsqueeze(1)
    roots, pulls = torch.linalg.cholesky(metrics).to(blocks), blocks @ metrics.to(blocks)
    size, width = codebook.shape
    identity = torch.eye(width, dtype=torch.float64, device=blocks.device)
    for rest in reversed(range(iterations)):
        codes = nearest(blocks, roots, codebook)
        counts = _counts(codes, size)
        matrices = (counts.T @ metrics.flatten(1)).view(size, width, width)
        sums = torch.zeros_like(codebook).index_add_(0, codes.flatten(), pulls.flatten(0, 1)).double()
        ridge = 1e-6 * matrices.diagonal(dim1=1, dim2=2).mean(1) + (counts.sum(0) == 0)
        matrices = matrices + ridge[:, None, None] * identity
        sums = sums + ridge.unsqueeze(1) * codebook.double()
        solved = torch.linalg.solve(matrices, sums.unsqueeze(2)).squeeze(2)
        codebook = torch.lerp(codebook.double(), solved, _RELAXATION if rest else 1.0).to(blocks)
    return codebook


def _counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each position `[positions, n]` uses each codeword: float64 `[positions, codebook_size]`."""
    positions = codes.shape[0]
    offsets = codebook_size * torch.arange(positions, device=codes.device).unsqueeze(1)
    counts = torch.bincount((codes + offsets).flatten(), minlength=positions * codebook_size)
    return counts.view(positions, codebook_size).double()
