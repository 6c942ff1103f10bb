"""Literal references: the formulas as they stand, slow and in float64, to hold the fast code against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.pq.blocks import Geometry, to_blocks, unfold_inputs

__all__ = [
    "SHAPES",
    "LiteralFit",
    "correlated_layer",
    "literal_distances",
    "literal_em",
    "literal_least_squares",
    "pooled_inputs",
    "reconstruction_objective",
]


SHAPES = {  # C_out, C_in, kernel, block size: the layers that the references are run on
    "3x3 d=9": (32, 12, 3, 9),
    "3x3 d=18": (32, 12, 3, 18),
    "1x1 d=4": (64, 32, 1, 4),
}


@dataclass(frozen=True, kw_only=True)
class LiteralFit:
    """What `literal_em` found; the fields mean what they mean in `bgd_plugin.pq.em.Fit`."""

    codebook: Tensor
    codes: Tensor


def correlated_layer(
    shape: tuple[int, int, int, int], images: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A convolution on smooth, rectified maps whose channels are mixed.

    Returns:
        blocks `[rows, blocks_per_row, d]`, activations x̃ `[n, d]`.
    """
    c_out, c_in, kernel, block_size = shape
    random = torch.Generator().manual_seed(7)
    maps = torch.randn(images, c_in, size + 2, size + 2, generator=random, dtype=dtype)
    maps = torch.nn.functional.avg_pool2d(maps, 3, stride=1)
    mixing = torch.randn(c_in, c_in, generator=random, dtype=dtype) / c_in**0.5
    maps = torch.einsum("nchw,cd->ndhw", maps, mixing).relu()
    weight = torch.randn(c_out, c_in, kernel, kernel, generator=random, dtype=dtype) / (c_in * kernel**2) ** 0.5
    unfolded = unfold_inputs(maps, Geometry.of((kernel, kernel), 1, kernel // 2, 1, 1))[0]
    return to_blocks(weight, block_size), pooled_inputs(unfolded, block_size)


def pooled_inputs(unfolded: Tensor, block_size: int) -> Tensor:
    """All input blocks x_i of a layer, one below the other: `[positions, D]` -> `[positions · D / d, d]`."""
    return unfolded.reshape(-1, block_size)


def literal_distances(activations: Tensor, blocks: Tensor, codeword: Tensor) -> Tensor:
    """‖x̃ (v − c)‖² for every block v and one codeword c, with the product x̃ (v − c) written out in full.

    Args:
        activations: x̃ `[n, d]`.
        blocks: `[blocks, d]`.
        codeword: `[d]`.
    """
    return (activations @ (blocks - codeword).T).square().sum(0)


def literal_em(
    blocks: Tensor, activations: Tensor, codebook_size: int, iterations: int, *, generator: torch.Generator
) -> LiteralFit:
    """The paper's EM from its formulas: distances and least squares on the activations, no Gram anywhere.

    E: a(v) = argmin_c ‖x̃ (c − v)‖², exhaustively. M: c = argmin_c Σ_{v: a(v) = c} ‖x̃ (c − v)‖². The start and the rule
    for empty clusters are those of `fit_em`, drawn from the generator in the same order.

    Args:
        blocks: `[rows, blocks_per_row, d]`, float64.
        activations: x̃ `[n, d]`, float64.
        codebook_size: k.
        iterations: at most so many.
        generator: as in `fit_em`.
    """
    flat = blocks.reshape(-1, blocks.shape[-1])
    start = torch.randperm(len(flat), generator=generator)[:codebook_size]
    codebook, codes, before = flat[start].clone(), torch.empty(0), float("inf")
    for _ in range(iterations):
        distances = torch.stack([literal_distances(activations, flat, codeword) for codeword in codebook], dim=1)
        new_codes = distances.argmin(1)
        _fill_empty(flat, activations, new_codes, codebook_size, generator)
        new_codebook = codebook.clone()
        for cluster in range(codebook_size):
            members = flat[new_codes == cluster]
            if len(members):
                new_codebook[cluster] = literal_least_squares(activations, members)
        objective = float((activations @ (flat - new_codebook[new_codes]).T).square().sum())
        if not objective < before:
            break
        codebook, codes, before = new_codebook, new_codes, objective
    return LiteralFit(codebook=codebook, codes=codes.view(blocks.shape[:2]))


def reconstruction_objective(blocks: Tensor, codebook: Tensor, codes: Tensor, gram: Tensor) -> float:
    """Σ_v (v − c_{a(v)})ᵀ G (v − c_{a(v)}) in float64.

    Args:
        blocks: `[rows, blocks_per_row, d]`.
        codebook: `[codebook_size, d]`.
        codes: int64 `[rows, blocks_per_row]`.
        gram: `[d, d]`.
    """
    difference = (blocks - codebook[codes]).double().flatten(0, 1)
    return float(((difference @ gram.double()) * difference).sum())


def literal_least_squares(activations: Tensor, members: Tensor) -> Tensor:
    """argmin_c Σ_v ‖x̃ c − x̃ v‖² over a cluster's blocks v `[members, d]`.

    Stacking the systems x̃ c = x̃ v of all members has the minimizers of the one system x̃ c = mean_v x̃ v, since
    Σ_v ‖x̃ c − x̃ v‖² = m ‖x̃ c − mean‖² + a constant; `test_the_m_step_solves_the_stacked_systems` checks it.
    """
    target = (activations @ members.T).mean(1, keepdim=True)
    solution: Tensor = torch.linalg.lstsq(activations, target).solution
    return solution.squeeze(1)


def _fill_empty(
    flat: Tensor, activations: Tensor, codes: Tensor, codebook_size: int, generator: torch.Generator
) -> None:
    """Split the most populated cluster until no cluster is empty or none can be split; changes `codes`."""
    unsplittable: set[int] = set()
    while True:
        counts = [int((codes == cluster).sum()) for cluster in range(codebook_size)]
        empty = [cluster for cluster in range(codebook_size) if counts[cluster] == 0]
        candidates = [c for c in range(codebook_size) if counts[c] > 1 and c not in unsplittable]
        if not empty or not candidates:
            return
        largest = max(candidates, key=counts.__getitem__)
        members = (codes == largest).nonzero().squeeze(1)
        from_mean = literal_distances(activations, flat[members], flat[members].mean(0))
        draw = torch.rand((), generator=generator, dtype=torch.float64) * from_mean.sum()
        chosen = members[min(int((from_mean.cumsum(0) <= draw).sum()), len(members) - 1)]
        nearer = literal_distances(activations, flat[members], flat[chosen]) < from_mean
        if nearer.all() or not nearer.any():
            unsplittable.add(largest)
        else:
            codes[members[nearer]] = empty[0]
