"""Codes that a target asks to change: against literal searches, and within their limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.tables import NEXT_STATE, trellis_offset
from bgd_plugin.pq.moves import Coding, Moves, block_moves, chosen_moves, code_lengths, walk_moves, walk_rate
from bgd_plugin.pq.trellis import encode_trellis

FREE = Coding(bits=torch.zeros(8), rate=0.0)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _objective(levels: Tensor, codes: Any, target: Tensor, importance: Tensor, coding: Coding) -> float:
    """Of a row of single weights, term by term."""
    result = 0.0
    for place, code in enumerate(codes):
        result += float(importance[place] * (levels[code] - target[place]) ** 2 + coding.rate * coding.bits[code])
    return result


@pytest.mark.parametrize("has_mask", [False, True])
def test_each_block_takes_the_codeword_with_the_lowest_objective(has_mask: bool) -> None:
    codebook, target, importance = _random(8, 3), _random(4, 6, seed=1), _random(4, 6, seed=2).abs()
    codes = torch.randint(0, 8, (4, 2), generator=torch.Generator().manual_seed(3))
    kept = _random(4, 6, seed=4) > -0.5 if has_mask else None
    coding = Coding(bits=torch.arange(8.0), rate=0.05)
    moves = block_moves(codebook, codes, target, importance, kept, coding)
    for row, block in itertools.product(range(4), range(2)):
        part = slice(3 * block, 3 * block + 3)
        is_kept = torch.ones(3) if kept is None else kept[row, part].float()
        costs = [
            float((importance[row, part] * is_kept * (word - target[row, part]) ** 2).sum()) + 0.05 * code
            for code, word in enumerate(codebook)
        ]
        best, old, number = min(range(8), key=costs.__getitem__), int(codes[row, block]), moves.number[row, block]
        assert int(moves.codes[row, block]) == best
        assert float(moves.gain[number]) == pytest.approx(costs[old] - costs[best], abs=1e-5)
        assert float(moves.bits[number]) == best - old
        change = ((codebook[best] - codebook[old]) * is_kept).square().sum()
        assert float(moves.energy[number]) == pytest.approx(float(change), abs=1e-5)
        assert float(moves.changes[number]) == (best != old)
    assert int(moves.changes.sum()) >= 3


def _walks(columns: int, size: int, offset: int) -> list[tuple[int, ...]]:
    """All rows of codes that the trellis allows."""
    found = []
    for codes in itertools.product(range(size), repeat=columns):
        state = 0
        for code in codes:
            if ((code + offset) ^ state) & 1:
                break
            state = int(NEXT_STATE[state, (code + offset) >> 1 & 1])
        else:
            found.append(codes)
    return found


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_the_new_walk_is_the_cheapest_of_all(offset: int) -> None:
    levels, walks = torch.linspace(-1.4, 1.4, 8), _walks(5, 8, offset)
    codes = torch.tensor(walks[:: len(walks) // 6][:6])
    target, importance = _random(6, 5, seed=offset), _random(6, 5, seed=9).abs() + 0.1
    moves = walk_moves(levels, codes, offset, target, importance, FREE)
    for row in range(6):
        best = min(_objective(levels, walk, target[row], importance[row], FREE) for walk in walks)
        mine = _objective(levels, moves.codes[row].tolist(), target[row], importance[row], FREE)
        assert mine == pytest.approx(best, abs=1e-5)


def _long_walks() -> tuple[Tensor, Tensor, Tensor, Tensor, Moves, Coding]:
    levels = torch.linspace(-2, 2, 16)
    weight = _random(12, 70)
    codes = encode_trellis(weight.unsqueeze(1), levels, 1, torch.zeros(16), torch.ones(12, 70), None).squeeze(1)
    target, importance = levels[codes] + 0.25 * _random(12, 70, seed=5), _random(12, 70, seed=6).abs() + 0.1
    coding = Coding(bits=code_lengths(codes, 16, 1), rate=walk_rate(levels))
    return levels, codes, target, importance, walk_moves(levels, codes, 1, target, importance, coding), coding


def test_any_stretch_can_be_taken_alone_and_gains_what_it_says() -> None:
    levels, codes, target, importance, moves, coding = _long_walks()
    changing = moves.changes.nonzero().flatten()
    assert len(changing) > 20 and (moves.changes[changing] > 1).any()
    for number in changing[:: max(1, len(changing) // 25)].tolist():
        new = torch.where(moves.number == number, moves.codes, codes)
        assert trellis_offset(new.numpy(), 16) is not None
        (row,) = (moves.number == number).any(1).nonzero().flatten().tolist()
        before, after = (_objective(levels, x[row], target[row], importance[row], coding) for x in (codes, new))
        assert float(moves.gain[number]) == pytest.approx(before - after, abs=1e-3)
        assert int(moves.changes[number]) == int((new != codes).sum())
        energy = float((levels[new] - levels[codes]).square().sum())
        assert float(moves.energy[number]) == pytest.approx(energy, abs=1e-4)
        assert float(moves.bits[number]) == pytest.approx(
            float((coding.bits[new] - coding.bits[codes]).sum()), abs=1e-3
        )


def test_codes_stay_where_nothing_is_asked() -> None:
    levels, codes, _, importance, _, coding = _long_walks()
    moves = walk_moves(levels, codes, 1, levels[codes], importance, FREE_16)
    assert torch.equal(moves.codes, codes)
    taken = chosen_moves(walk_moves(levels, codes, 1, levels[codes], importance, coding), 1e9, 1e9, math.inf)
    assert float(moves.changes.sum()) == 0 and float(taken.sum()) < 0.02 * codes.numel()


FREE_16 = Coding(bits=torch.zeros(16), rate=0.0)


@pytest.mark.parametrize(("changes", "energy"), [(7.0, 1e9), (1e9, 0.5), (0.5, 1e9), (1e9, 0.0)])
def test_limits_hold_and_the_best_come_first(changes: float, energy: float) -> None:
    *_, moves, _ = _long_walks()
    taken = chosen_moves(moves, changes, energy, math.inf)
    assert float(moves.changes[taken].sum()) <= changes and float(moves.energy[taken].sum()) <= energy
    assert bool(taken.any()) == (changes >= 1 and energy > 0)
    left = (moves.gain > 0) & (moves.energy > 0) & (moves.changes <= changes) & (moves.energy <= energy) & ~taken
    rank = moves.gain / moves.energy.clamp(min=1e-30)
    assert not taken.any() or float(rank[taken].min()) >= float(rank[left].max())


def test_bits_are_limited() -> None:
    *_, moves, _ = _long_walks()
    free = float(moves.bits[chosen_moves(moves, 1e9, 1e9, math.inf)].sum())
    for most in (0.0, 0.3 * free):
        taken = chosen_moves(moves, 1e9, 1e9, most)
        assert free > most >= float(moves.bits[taken].sum())
        assert taken.any()


def test_no_move_gains_nothing() -> None:
    *_, moves, _ = _long_walks()
    losing = Moves(**(vars(moves) | {"gain": -moves.gain.abs()}))
    assert not chosen_moves(losing, 1e9, 1e9, 0.0).any()


def test_the_length_of_a_code_is_that_of_its_frequency() -> None:
    codes = torch.tensor([0] * 8 + [1] * 4 + [2] * 4)
    plain = code_lengths(codes, 3, None)
    assert plain.tolist() == pytest.approx([math.log2(16.75 / 8.25), *[math.log2(16.75 / 4.25)] * 2])
    by_quantizer = code_lengths(codes, 3, 0)
    assert by_quantizer[1] < 0.1 and float(by_quantizer[0]) == pytest.approx(math.log2(12.5 / 8.25))
