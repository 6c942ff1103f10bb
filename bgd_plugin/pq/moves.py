"""Codes that a target asks to change: single codes, or stretches of a trellis' walk, each with what it gains.

The objective of a code is its weighted squared distance to the target, plus what its bits cost:
J(c) = Σ_i importance_i · (codeword_i(c) − target_i)² + rate · bits(c). Where the file holds codes as a walk through a
trellis, a code determines which codes may follow. The cheapest walk is searched for, and leaves the old one and joins
it again: each stretch between is one move, and any of them can be made without the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.encoding.tables import NEXT_STATE, contexts
from bgd_plugin.pq.line import running_sums
from bgd_plugin.pq.trellis import encode_trellis

__all__ = ["Coding", "Moves", "block_moves", "chosen_moves", "code_lengths", "walk_moves", "walk_rate"]

_SCRATCH = 1 << 22
_STEPS = 24
_GRANULAR_GAIN = 1.26


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Codes that would change.

    Attributes:
        codes: int64 `[rows, blocks_per_row]`, with every move made.
        number: int64, the same shape: to which move a code belongs.
        gain: `[moves]`, by how much each lowers the objective.
        bits: `[moves]`, how many bits each adds to the file.
        energy: `[moves]`, the sum of squares by which each changes the decoded weight.
        changes: `[moves]`, the number of codes that each changes.
    """

    codes: Tensor
    number: Tensor
    gain: Tensor
    bits: Tensor
    energy: Tensor
    changes: Tensor


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What the bits of codes cost.

    Attributes:
        bits: `[codebook_size]`, of each code.
        rate: of a bit, in units of the objective.
    """

    bits: Tensor
    rate: float


def code_lengths(codes: Tensor, size: int, offset: int | None) -> Tensor:
    """Bits that an entropy coder takes for each code, by its frequency; one that does not occur is not ruled out.

    Args:
        codes: integers, any shape.
        size: number of codes.
        offset: of the first code's place in the trellis' grid; None: no trellis.

    Returns:
        `[size]`, float32.
    """
    counts = torch.bincount(codes.long().flatten(), minlength=size).double() + 0.25
    table = torch.from_numpy(contexts(size, offset)).to(counts.device)
    totals = torch.zeros(2, dtype=counts.dtype, device=counts.device).index_add_(0, table, counts)
    return (totals[table] / counts).log2().float()


def walk_rate(levels: Tensor) -> float:
    """The squared error for which a bit is exchanged at the rate that a trellis' grid stands for, as in `pq.entropy`.

    Args:
        levels: `[size]`, in the order of the grid.
    """
    step = 2 * float(levels.flatten().diff().abs().median())
    return step**2 * 2 * math.log(2) / (12 * _GRANULAR_GAIN)


@torch.no_grad()
def block_moves(
    codebook: Tensor, codes: Tensor, target: Tensor, importance: Tensor, kept: Tensor | None, coding: Coding
) -> Moves:
    """Each code on its own: the codeword with the lowest objective.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: integers `[rows, blocks_per_row]`.
        target: `[rows, columns]`.
        importance: `[rows, columns]`, at least 0.
        kept: bool `[rows, columns]`, false where the weight is zero whatever the code; None: nowhere.
        coding: what bits cost.
    """
    width = codebook.shape[1]
    points, weights = target.reshape(-1, width), importance.reshape(-1, width)
    if kept is not None:
        weights = weights * kept.reshape(-1, width)
    old = codes.long().flatten()
    costs = (coding.rate * coding.bits).to(codebook)
    new = torch.empty_like(old)
    rows = max(1, _SCRATCH // len(codebook))
    squares = codebook.square().T
    for start in range(0, len(points), rows):
        part = slice(start, start + rows)
        table = weights[part] @ squares - 2 * (weights[part] * points[part]) @ codebook.T + costs
        new[part] = table.argmin(1)
    before, after = codebook[old], codebook[new]
    gain = (weights * ((before - points).square() - (after - points).square())).sum(1) + costs[old] - costs[new]
    change = (after - before).square()
    if kept is not None:
        change = change * kept.reshape(-1, width)
    return Moves(
        codes=new.view(codes.shape),
        number=torch.arange(len(new), device=new.device).view(codes.shape),
        gain=gain,
        bits=coding.bits[new] - coding.bits[old],
        energy=change.sum(1),
        changes=(new != old).to(gain),
    )


@torch.no_grad()
def walk_moves(levels: Tensor, codes: Tensor, offset: int, target: Tensor, importance: Tensor, coding: Coding) -> Moves:
    """Stretches of rows' cheapest walks through the trellis, from where they leave the old ones to where they join.

    Args:
        levels: `[size]`, in the order of the trellis' grid.
        codes: integers `[rows, columns]`, a walk in each row.
        offset: of the first level's place in the grid, 0 to 3.
        target: `[rows, columns]`.
        importance: `[rows, columns]`, at least 0.
        coding: what bits cost.
    """
    costs = (coding.rate * coding.bits).to(levels)
    root = importance.sqrt()
    new = encode_trellis(target.unsqueeze(1), levels, offset, costs, root, None).squeeze(1)
    old = codes.long()
    joined = _states(old, offset) == _states(new, offset)
    number = joined.long().flatten().cumsum(0).view(codes.shape) - joined.long()  # a stretch ends where they join
    before, after = levels[old], levels[new]
    gain = importance * ((before - target).square() - (after - target).square()) + costs[old] - costs[new]
    count = int(number.max()) + 1

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(
            0, number.flatten(), values.flatten()
        )

    return Moves(
        codes=new,
        number=number,
        gain=summed(gain),
        bits=summed(coding.bits[new] - coding.bits[old]),
        energy=summed((after - before).square()),
        changes=summed((new != old).to(gain)),
    )


def _states(codes: Tensor, offset: int) -> Tensor:
    """The trellis' state after each code of `[rows, columns]`; rows end as if joined, so that no stretch passes on."""
    table = torch.from_numpy(NEXT_STATE).to(codes.device)
    kinds = (codes + offset) >> 1 & 1
    state = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    states = torch.zeros_like(kinds)
    for column in range(codes.shape[1] - 1):
        state = table[state, kinds[:, column]]
        states[:, column] = state
    return states


@torch.no_grad()
def chosen_moves(moves: Moves, most_changes: float, most_energy: float, most_bits: float) -> Tensor:
    """The moves with the highest gain for the change of the weight, as far as the limits allow.

    Args:
        moves: as found.
        most_changes: number of codes that may change.
        most_energy: sum of squares by which the decoded weight may change.
        most_bits: number of bits that they may add, all together; at least 0. Where they would add more, a
            bit has to gain more.

    Returns:
        bool `[moves]`.
    """
    extra = 0.0
    for _ in range(_STEPS):
        gain = moves.gain - extra * moves.bits
        wanted = (gain > 0) & (moves.energy > 0) & (moves.changes <= most_changes) & (moves.energy <= most_energy)
        order = torch.where(wanted, gain / moves.energy.clamp(min=1e-30), -torch.inf).argsort(
            descending=True, stable=True
        )
        fits = running_sums(moves.changes[order]) <= most_changes
        fits &= running_sums(moves.energy[order]) <= most_energy
        taken = torch.zeros_like(wanted)
        taken[order] = fits & wanted[order]
        if float(moves.bits[taken].sum()) <= most_bits:
            return taken
        positive = taken & (moves.bits > 0)
        typical = float((moves.gain[positive] / moves.bits[positive]).median())
        extra = max(2 * extra, typical / 8)
    return torch.zeros_like(wanted)
