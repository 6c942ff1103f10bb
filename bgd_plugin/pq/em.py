"""The paper's EM, run as k-means in the space where the layer's inputs are white."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.pq.kmeans import cluster_sums, kmeans
from bgd_plugin.pq.line import spread_on_a_line
from bgd_plugin.pq.powers import near_one

__all__ = ["Fit", "fit_em", "gram_root"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted codebook and its codes."""

    codebook: Tensor
    """`[codebook_size, block_size]`, dtype and device of the blocks."""
    codes: Tensor
    """int64 `[rows, blocks_per_row]`."""


@torch.no_grad()
def fit_em(
    blocks: Tensor,
    gram: Tensor,
    codebook_size: int,
    iterations: int,
    *,
    generator: torch.Generator,
    compiled: bool = False,
) -> Fit:
    """Choose a codebook and codes that minimize Σ_v ‖x̃ (v − c_{a(v)})‖², x̃ `[n, d]` the pooled input blocks.

    With G = x̃ᵀx̃ = L Lᵀ the distance is ‖(v − c) L‖², so this is k-means on the points v L, and its cost does not
    depend on n. The M-step, least squares of x̃ c against x̃ v over a cluster's blocks v, has the normal equations
    G (c − v̄) = 0. If G has full rank, the cluster mean v̄ is the only solution; otherwise v̄ is the solution that also
    fits the directions absent from the inputs. So codewords are always means of blocks.
    The initial codewords are `codebook_size` blocks drawn at random without replacement; those of one weight are spread
    by the weights' density (`spread_on_a_line`).

    Args:
        blocks: `[rows, blocks_per_row, d]`; computed in float64 if they are float64, otherwise in float32.
        gram: `[d, d]`, G = Σ x_iᵀ x_i over all block positions, any float type; its scale does not affect the codes.
        codebook_size: k, at most the number of blocks.
        iterations: maximum number; the fit stops early when the objective no longer falls.
        generator: draws the initial codewords, and the splits that refill empty clusters.
        compiled: see `kmeans`.

    Raises:
        ValueError: fewer blocks than codewords, NaN or Inf in blocks or Gram, or a Gram of the wrong size.

    **Source**: Stock et al., arXiv 1907.05686, section 3 (E-step and M-step); the Gram form is ours.
    """
    _check(blocks, gram, codebook_size)
    flat = blocks.flatten(0, 1)
    flat, unit = near_one(flat if flat.dtype == torch.float64 else flat.float())
    start = _start(flat, codebook_size, generator)
    root = gram_root(gram, flat.dtype).to(flat)
    found = kmeans(flat @ root, start @ root, iterations, generator=generator, compiled=compiled)
    counts = torch.bincount(found.codes, minlength=codebook_size).unsqueeze(1)
    means = cluster_sums(flat, found.codes, codebook_size) / counts.clamp(min=1)
    codebook = (torch.where(counts > 0, means, start) * unit).to(blocks.dtype)
    return Fit(codebook=codebook, codes=found.codes.view(blocks.shape[:2]))


def _start(blocks: Tensor, codebook_size: int, generator: torch.Generator) -> Tensor:
    """Initial codewords `[k, d]` for blocks `[n, d]`."""
    if blocks.shape[1] == 1:
        return spread_on_a_line(blocks[:, 0], codebook_size).unsqueeze(1)
    chosen = torch.randperm(len(blocks), generator=generator, device=generator.device)[:codebook_size]
    return blocks[chosen.to(blocks.device)]


def gram_root(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """L (float64 `[d, d]`) with L Lᵀ in proportion to G, and entries of the order of 1.

    Uses an eigendecomposition, because Cholesky fails on singular Grams, which do occur: dead channels, fewer inputs
    than d, all zeros. Eigenvalues below the rounding error of `dtype` are raised to it, so that directions without
    energy still break ties between codewords; with no energy at all this is plain k-means.

    Args:
        gram: G, `[d, d]`.
        dtype: of the computation to follow; its rounding error is the floor.
    """
    symmetric = (gram.double() + gram.double().T) / 2
    trace = float(symmetric.trace())
    if trace <= 0:
        return torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    values, vectors = torch.linalg.eigh(symmetric / (trace / len(gram)))
    root: Tensor = vectors * values.clamp(min=len(gram) * torch.finfo(dtype).eps).sqrt()
    return root


def _check(blocks: Tensor, gram: Tensor, codebook_size: int) -> None:
    count, block_size = blocks.shape[0] * blocks.shape[1], blocks.shape[2]
    if not 1 <= codebook_size <= count:
        raise ValueError(f"{count} blocks are fewer than {codebook_size} codewords")
    if gram.shape != (block_size, block_size):
        raise ValueError(f"the Gram is {tuple(gram.shape)} and does not suit blocks of {block_size}")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the inputs hold NaN or Inf")
    if not bool(torch.isfinite(blocks).all()):
        raise ValueError("the weights hold NaN or Inf")
