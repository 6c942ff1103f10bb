"""Encoding with error feedback: later blocks of a row compensate for the error of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bgd_plugin.jit.nearest import can_search, search
from bgd_plugin.jit.sweep import can_sweep, encode_
from bgd_plugin.pq.line import nearest_on_a_line
from bgd_plugin.pq.masked import masked, nearest_masked
from bgd_plugin.pq.panels import Panels

__all__ = [
    "cholesky",
    "damped",
    "damping_of",
    "diagonal_blocks",
    "encode_damped",
    "encode_with_feedback",
    "factors",
    "grouped",
    "nearest",
]

_LEAST_SHARE = 1e-4
_MOST_TIMES = 100.0

_SCRATCH = 1 << 18
"""Distances held at a time: 1 MiB of float32, which fits a core's L2 cache."""
_COLUMNS = 512
"""Columns of the inverse computed at a time."""


@torch.no_grad()
def encode_with_feedback(weight: Tensor, codebook: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """Encode a layer's rows block by block, and carry each block's error over to the blocks still to come.

    With the damped Gram H = V Vᵀ, V upper triangular, U = V⁻¹ gives H⁻¹ = Uᵀ U, and the rows from I on of U give the
    inverse of H restricted to the blocks from I on. So for block I:

    * the metric, with all later blocks free to compensate, is (H⁻¹_II)⁻¹ = V_II V_IIᵀ: choose the codeword nearest to
      w_I after both are multiplied by V_II;
    * the later blocks J become w_J ← w_J − e_I (H⁻¹_II)⁻¹ H⁻¹_IJ = w_J − e_I V_II U_IJ, with e_I = w_I − c.

    Both factors come from one Cholesky factorization; all is computed in the weight's dtype.

    Args:
        weight: `[rows, columns]`, float32 or float64; the rows of each group are contiguous.
        codebook: `[codebook_size, block_size]`, shared by all groups.
        gram: `[groups, columns, columns]`, H of each group's inputs; `[columns, columns]` for one group.
        damping: added to H's diagonal, as a factor of its mean; above 0, because few inputs leave H singular.

    Returns:
        int64 `[rows, columns / block_size]`.

    Raises:
        ValueError: incompatible shapes, or no damping.

    **Source**: Frantar et al., GPTQ, arXiv 2210.17323, section 3; van Baalen et al., GPTVQ, arXiv 2402.15319, for
    blocks.
    """
    if not damping > 0:
        raise ValueError(f"error feedback needs a damping above 0, not {damping}")
    return encode_damped(weight, codebook, damped(grouped(weight, gram)[1], damping))


@torch.no_grad()
def encode_damped(weight: Tensor, codebook: Tensor, gram: Tensor, mask: Tensor | None = None) -> Tensor:
    """`encode_with_feedback` with a Gram `[groups, columns, columns]` that is already damped.

    Args:
        weight: `[rows, columns]`, float32 or float64; the rows of each group are contiguous.
        codebook: `[codebook_size, block_size]`.
        gram: `[groups, columns, columns]`, positive definite.
        mask: bool `[rows, columns]`, false where the decoded weight is zero; the error this causes is carried over too.
            None: nowhere.

    Returns:
        int64 `[rows, columns / block_size]`.

    Raises:
        ValueError: the block size does not divide the row.
    """
    rows, grams = grouped(weight, gram)
    block_size = codebook.shape[1]
    if rows.shape[2] % block_size:
        raise ValueError(f"{rows.shape[2]} weights per row do not divide into blocks of {block_size}")
    metrics, inverse = (factor.to(weight) for factor in factors(grams.to(weight), block_size))
    rest, kept = Panels(rows.clone(), inverse, block_size), None if mask is None else mask.reshape(rows.shape)
    codes = torch.empty(*rows.shape[:2], rows.shape[2] // block_size, dtype=torch.int64, device=weight.device)
    if mask is None and can_sweep(rows, codebook):
        for blocks in rest.spans():
            carried = encode_(codes[:, :, blocks], *rest.part(blocks), metrics[:, blocks], codebook.to(rows))
            rest.change_beyond_(blocks, carried)
        return codes.flatten(0, 1)
    for block in range(codes.shape[2]):
        here = slice(block * block_size, (block + 1) * block_size)
        metric = metrics[:, block]
        here_kept = None if kept is None else kept[:, :, here]
        codes[:, :, block] = nearest(rest[block], metric, codebook, here_kept)
        error = rest[block] - masked(codebook[codes[:, :, block]].to(rows), here_kept)
        rest.change_(block, error @ metric)
    return codes.flatten(0, 1)


def grouped(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as `[groups, rows_per_group, columns]` and the Gram as `[groups, columns, columns]`.

    Args:
        weight: `[rows, columns]`, the rows of each group contiguous.
        gram: `[groups, columns, columns]`, or `[columns, columns]` for one group.

    Raises:
        ValueError: the shapes are incompatible.
    """
    grams = gram if gram.dim() == 3 else gram.unsqueeze(0)
    groups, columns = grams.shape[0], weight.shape[1]
    if grams.shape[1:] != (columns, columns) or weight.shape[0] % groups:
        raise ValueError(f"a Gram of shape {tuple(gram.shape)} does not suit a weight of {tuple(weight.shape)}")
    return weight.reshape(groups, -1, columns), grams


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I per group, symmetric, in H's dtype; the identity for a group without input.

    Args:
        gram: `[groups, columns, columns]`.
        damping: see `damping_of`.
    """
    symmetric = (gram + gram.mT).div_(2)
    diagonal = symmetric.diagonal(dim1=1, dim2=2)
    diagonal += damping_of(diagonal, damping).to(diagonal)
    return symmetric


def damping_of(diagonal: Tensor, damping: float) -> Tensor:
    """What `damped` adds to a Gram's diagonal: float64, of its shape.

    Columns that are almost always zero, such as kernel weights that only see padding, are damped by a hundred times
    their own power where that is less: otherwise the damping alone would give them weight in the fit. One part in
    10,000 of the mean remains, which keeps H invertible.

    Args:
        diagonal: `[groups, columns]`.
        damping: as a factor of the diagonal's mean.
    """
    power = diagonal.double().clamp(min=0)
    level = power.mean(1, keepdim=True)
    added = torch.minimum(level, _MOST_TIMES * power) + _LEAST_SHARE * level
    return torch.where(level > 0, damping * added, torch.ones_like(added))


def diagonal_blocks(gram: Tensor, block_size: int) -> Tensor:
    """The Gram of each block position: `[groups, columns, columns]` -> `[groups, blocks_per_row, d, d]`.

    Args:
        gram: `[groups, columns, columns]`.
        block_size: d, a divisor of `columns`.
    """
    groups, columns = gram.shape[:2]
    squares = gram.reshape(groups, columns // block_size, block_size, columns // block_size, block_size)
    return squares.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


@torch.no_grad()
def nearest(points: Tensor, metric: Tensor, codebook: Tensor, mask: Tensor | None = None) -> Tensor:
    """The codeword with the smallest ‖(point − codeword) metric‖, for each point.

    Args:
        points: `[groups, n, d]`.
        metric: `[groups, d, d]`, multiplied from the right.
        codebook: `[codebook_size, d]`, the same for all groups.
        mask: bool `[groups, n, d]`, false where the codeword counts as zero; all true if not given.

    Returns:
        int64 `[groups, n]`.
    """
    if mask is not None:
        return nearest_masked(points, metric @ metric.mT, codebook, mask)
    if codebook.shape[1] == 1:  # whatever the metric
        return nearest_on_a_line(points[:, :, 0], codebook[:, 0].to(points))
    # Subtract the codebook's mean first: float32 loses accuracy in differences of large numbers.
    centre = codebook.mean(0)
    moved = (points - centre.to(points)) @ metric
    words = (codebook - centre).to(points) @ metric
    if can_search(moved):
        return search(moved, words)
    norms = words.square().sum(2).unsqueeze(1)
    codes = torch.empty(points.shape[:2], dtype=torch.int64, device=points.device)
    for groups, rows in _pieces(points.shape[0], points.shape[1], codebook.shape[0]):
        distances = torch.baddbmm(norms[groups], moved[groups, rows], words[groups].mT, alpha=-2)
        if distances.device.type == "cpu":  # numpy's is several times as fast as torch's
            codes[groups, rows] = torch.from_numpy(distances.numpy().argmin(2))
        else:
            codes[groups, rows] = distances.argmin(2)
    return codes


def _pieces(groups: int, rows: int, codewords: int) -> Iterator[tuple[slice, slice]]:
    """Slices of groups and rows whose distances fit in the scratch buffer."""
    row_step = max(1, min(rows, _SCRATCH // codewords))
    group_step = max(1, _SCRATCH // (codewords * row_step))
    for group in range(0, groups, group_step):
        for row in range(0, rows, row_step):
            yield slice(group, group + group_step), slice(row, row + row_step)


def cholesky(gram: Tensor) -> Tensor:
    """The lower factor L of H = L Lᵀ, `[..., columns, columns]`, in H's dtype.

    A damped Gram is far from singular, whatever the scale of its columns, so that single precision does; where it does
    not, the factor is computed, and returned, in float64.

    Args:
        gram: H, `[..., columns, columns]`, symmetric and positive definite.

    Raises:
        LinAlgError: H is not positive definite.
    """
    factor: Tensor
    if gram.dtype != torch.float64:
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not bool(failed.any()):
            return factor
    factor = torch.linalg.cholesky(gram.double())
    return factor


def factors(gram: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """With gram = V Vᵀ, V upper triangular: V's diagonal blocks `[groups, blocks_per_row, d, d]`, and the whole V⁻¹.

    Cholesky gives a lower triangle; for the matrix with rows and columns reversed this is V reversed. The inverse is
    computed in V's memory, a few columns at a time. For columns with diagonal triangle T, let B be the part of V above
    T, and X the inverse of the triangle to the left of B: the inverse is T⁻¹ on the diagonal and −X B T⁻¹ above.

    Args:
        gram: `[groups, columns, columns]`, symmetric and positive definite (damped).
        block_size: d, a divisor of the columns.

    Returns:
        `[groups, blocks_per_row, d, d]` and `[groups, columns, columns]`, in the Gram's dtype; in float64 where
        rounding to single precision leaves it not positive definite.
    """
    root = cholesky(gram.flip((1, 2))).flip((1, 2))
    metrics = diagonal_blocks(root, block_size).clone()
    for start in range(0, gram.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, gram.shape[1])
        above, own = root[:, :start, start:end], root[:, start:end, start:end]
        identity = torch.eye(end - start, dtype=root.dtype, device=gram.device).expand(len(gram), -1, -1)
        own.copy_(torch.linalg.solve_triangular(own, identity, upper=True))
        above.copy_((root[:, :start, :start] @ above) @ own.neg())
    return metrics, root
