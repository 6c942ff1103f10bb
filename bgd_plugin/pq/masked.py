"""K-means for blocks with pruned weights: a codeword's value at a pruned position does not count.

A block v has a mask m, and is decoded from codeword c as m ∘ c. All distances are ‖v − m∘c‖² in some metric P:
(v − m∘c)ᵀ P (v − m∘c) = vᵀPv − 2 (m ∘ Pv)·c + Σ_ij m_i m_j P_ij c_i c_j. The last term is linear in the products
m_i m_j, so one matrix product gives the distances of many blocks to all codewords, whatever their masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bgd_plugin.pq.em import Fit, gram_root
from bgd_plugin.pq.powers import near_one

__all__ = ["codeword_uses", "fit_em_masked", "fit_masked", "masked", "nearest_masked"]

_SCRATCH = 1 << 20
_STILL = 1e-4
"""Stop after an iteration that lowers the objective by less than this fraction."""


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values, set to zero where the mask is false.

    Args:
        values: any shape.
        mask: bool, as many items as `values` in the same order, of any shape; None: nothing is set to zero.

    Returns:
        the shape of `values`.
    """
    return values if mask is None else torch.where(mask.reshape(values.shape), values, 0.0)


@torch.no_grad()
def nearest_masked(points: Tensor, metrics: Tensor, codebook: Tensor, mask: Tensor) -> Tensor:
    """The codeword with the smallest (point − mask ∘ codeword)ᵀ P (point − mask ∘ codeword), for each point.

    Args:
        points: `[groups, n, d]`; their values at pruned positions count too.
        metrics: `[groups, d, d]`, P, symmetric.
        codebook: `[codebook_size, d]`, the same for all groups.
        mask: bool `[groups, n, d]`.

    Returns:
        int64 `[groups, n]`.
    """
    words = codebook.to(points)
    first, second = torch.triu_indices(words.shape[1], words.shape[1], device=points.device)
    twice = torch.where(first == second, 1.0, 2.0).to(points)
    products = words[:, first] * words[:, second] * twice
    codes = torch.empty(points.shape[:2], dtype=torch.int64, device=points.device)
    step = max(1, _SCRATCH // max(len(words), len(first)))
    for group, metric in enumerate(metrics.to(points)):
        table = torch.cat([-2 * words, products * metric[first, second]], dim=1).T
        for part in range(0, points.shape[1], step):
            rows = slice(part, part + step)
            kept = mask[group, rows].to(points)
            features = torch.cat([points[group, rows] @ metric * kept, kept[:, first] * kept[:, second]], dim=1)
            codes[group, rows] = (features @ table).argmin(1)
    return codes


@torch.no_grad()
def fit_masked(
    blocks: Tensor, metrics: Tensor, mask: Tensor, codebook_size: int, iterations: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """K-means with one metric per position p: min Σ_p Σ_v (v − m∘c_a)ᵀ P_p (v − m∘c_a).

    An iteration solves each codeword by least squares over its blocks, (Σ P ∘ m mᵀ) c = Σ m ∘ P v, then assigns each
    block its nearest codeword. An unused codeword is set to the block with the largest error. No step raises the
    objective, except for a ridge of 1e-6 that holds a codeword in place where its blocks have no kept weight.

    Args:
        blocks: `[positions, n, d]`.
        metrics: `[positions, d, d]`, positive definite.
        mask: bool `[positions, n, d]`, true where a weight is kept.
        codebook_size: k, at most the number of blocks.
        iterations: maximum number; stops early when the objective hardly falls.
        generator: draws the initial codewords.

    Returns:
        codebook `[codebook_size, d]`, and the nearest codes `[positions, n]`.
    """
    codebook = _start(blocks, mask, codebook_size, generator)
    codes = nearest_masked(blocks, metrics, codebook, mask)
    objective = math.inf
    for _ in range(iterations):
        codebook = _least_squares(blocks, metrics, mask, codes, codebook)
        losses = _losses(blocks, metrics, mask, codebook[codes])
        before, objective = objective, float(losses.sum())
        codebook = _filled(blocks, mask, codes, codebook, losses)
        codes = nearest_masked(blocks, metrics, codebook, mask)
        if not objective < before * (1 - _STILL):
            break
    return codebook, codes


@torch.no_grad()
def fit_em_masked(
    blocks: Tensor, gram: Tensor, mask: Tensor, codebook_size: int, iterations: int, *, generator: torch.Generator
) -> Fit:
    """`fit_em` for pruned blocks.

    Args:
        blocks: `[rows, blocks_per_row, d]`.
        gram: `[d, d]`.
        mask: bool, the shape of `blocks`; false where the decoded weight is zero.
        codebook_size: k, the number of codewords.
        iterations: maximum number of EM steps.
        generator: draws the initial codewords.
    """
    flat, unit = near_one(blocks.flatten(0, 1).unsqueeze(0))
    root = gram_root(gram, torch.float32)
    metric, kept = (root @ root.T).unsqueeze(0), mask.flatten(0, 1).unsqueeze(0)
    codebook, codes = fit_masked(flat, metric, kept, codebook_size, iterations, generator=generator)
    return Fit(codebook=(codebook * unit).to(blocks.dtype), codes=codes.view(blocks.shape[:2]))


def codeword_uses(codes: Tensor, mask: Tensor | None, codebook_size: int, block_size: int) -> Tensor:
    """Number of weights that each codebook entry represents: float32 `[codebook_size, block_size]`.

    Args:
        codes: integers, any shape.
        mask: bool, one item per weight, of any shape; None: all weights are kept.
    """
    flat = codes.reshape(-1).long()
    if mask is None:
        return torch.bincount(flat, minlength=codebook_size).float().unsqueeze(1).expand(-1, block_size)
    uses = torch.zeros(codebook_size, block_size, dtype=torch.float32, device=codes.device)
    return uses.index_add_(0, flat, mask.reshape(-1, block_size).float())


def _start(blocks: Tensor, mask: Tensor, codebook_size: int, generator: torch.Generator) -> Tensor:
    """Blocks drawn at random; their pruned positions are filled from other blocks with a weight there."""
    flat, kept = blocks.flatten(0, 1), mask.flatten(0, 1)
    start, found = torch.zeros_like(flat[:codebook_size]), torch.zeros_like(kept[:codebook_size])
    for _ in range(8):
        chosen = torch.randperm(len(flat), generator=generator, device=generator.device)[:codebook_size].to(flat.device)
        start = torch.where(found | ~kept[chosen], start, flat[chosen])
        found = found | kept[chosen]
    return start


def _least_squares(blocks: Tensor, metrics: Tensor, mask: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    size, width = codebook.shape
    matrices = torch.zeros(size, width, width, dtype=torch.float64, device=blocks.device)
    sums = torch.zeros_like(codebook)
    step = max(1, _SCRATCH // width**2)
    for group, metric in enumerate(metrics.to(blocks)):
        pairs = torch.zeros(size, width, width, dtype=torch.float32, device=blocks.device)
        for part in range(0, blocks.shape[1], step):
            rows = slice(part, part + step)
            kept, chosen = mask[group, rows].to(pairs), codes[group, rows]
            pairs.index_add_(0, chosen, kept.unsqueeze(2) * kept.unsqueeze(1))
            sums.index_add_(0, chosen, blocks[group, rows] @ metric * kept)
        matrices += pairs * metric.double()
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(1) + (diagonal.sum(1) == 0)
    matrices = matrices + ridge[:, None, None] * torch.eye(width, dtype=torch.float64, device=blocks.device)
    wanted = sums.double() + ridge.unsqueeze(1) * codebook.double()
    solved: Tensor = torch.linalg.solve(matrices, wanted.unsqueeze(2)).squeeze(2)
    return solved.to(blocks)


def _losses(blocks: Tensor, metrics: Tensor, mask: Tensor, words: Tensor) -> Tensor:
    """float64 `[positions, n]`."""
    difference = (blocks - masked(words, mask)).double()
    return ((difference @ metrics.double()) * difference).sum(2)


def _filled(blocks: Tensor, mask: Tensor, codes: Tensor, codebook: Tensor, losses: Tensor) -> Tensor:
    """The codebook with its unused codewords replaced by the blocks with the largest error."""
    empty = (torch.bincount(codes.flatten(), minlength=len(codebook)) == 0).nonzero().flatten()
    worst = losses.flatten().topk(min(len(empty), losses.numel())).indices
    words = torch.where(mask.flatten(0, 1)[worst], blocks.flatten(0, 1)[worst], codebook[codes.flatten()[worst]])
    result = codebook.clone()
    result[empty[: len(worst)]] = words.to(codebook)
    return result
