"""The codebook against lstsq on the stacked system, the codes against trying every codeword."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.feedback import damped, encode_with_feedback
from bgd_plugin.pq.least_squares import output_objective, refine_codes, solve_codebook
from tests.pq.test_feedback import layer, random_codebook


def literal_objective(weight: Tensor, codebook: Tensor, codes: Tensor, gram: Tensor) -> float:
    """Row by row, e H eᵀ."""
    per_group = weight.shape[0] // gram.shape[0]
    total = 0.0
    for row in range(weight.shape[0]):
        error = weight[row] - codebook[codes[row]].flatten()
        total += float(error @ gram[row // per_group] @ error)
    return total


def stacked_least_squares(weight: Tensor, codes: Tensor, gram: Tensor, size: int) -> Tensor:
    """One row of equations for each row of the layer and column of a root of H; unknowns: the codebook, flattened."""
    per_group, blocks = weight.shape[0] // gram.shape[0], codes.shape[1]
    block_size = weight.shape[1] // blocks
    matrices, sides = [], []
    for row in range(weight.shape[0]):
        root = torch.linalg.cholesky(gram[row // per_group]).T
        matrix = torch.zeros(weight.shape[1], size * block_size, dtype=torch.float64)
        for block in range(blocks):
            columns = slice(block * block_size, (block + 1) * block_size)
            words = slice(int(codes[row, block]) * block_size, (int(codes[row, block]) + 1) * block_size)
            matrix[:, words] += root[:, columns]
        matrices.append(matrix)
        sides.append(root @ weight[row])
    solution: Tensor = torch.linalg.lstsq(torch.cat(matrices), torch.cat(sides).unsqueeze(1), driver="gelsd").solution
    return solution.reshape(size, block_size)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_codebook_is_lstsqs(groups: int) -> None:
    weight, gram = layer(groups, 24, 12)
    gram = damped(gram, 0.01)
    start = random_codebook(8, 4)
    codes = torch.randint(0, 8, (len(weight), 3), generator=torch.Generator().manual_seed(2))
    assert set(codes.flatten().tolist()) == set(range(8))
    found, _ = solve_codebook(weight, codes, gram, start, iterations=500, tolerance=1e-24)
    expected = stacked_least_squares(weight, codes, gram, 8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_objective_is_the_literal_one() -> None:
    weight, gram = layer(3, 10, 12)
    codebook = random_codebook(8, 4)
    codes = torch.randint(0, 8, (30, 3), generator=torch.Generator().manual_seed(3))
    expected = literal_objective(weight, codebook, codes, gram)
    assert output_objective(weight, codebook, codes, gram) == pytest.approx(expected, rel=1e-12)


def test_an_unused_codeword_stays_where_it_is() -> None:
    weight, gram = layer(1, 20, 8)
    start = random_codebook(6, 4)
    codes = torch.randint(0, 5, (20, 2), generator=torch.Generator().manual_seed(0))
    found, _ = solve_codebook(weight, codes, gram, start)
    assert torch.equal(found[5], start[5])
    assert not torch.equal(found[0], start[0])


def test_a_silent_layer_keeps_its_codebook() -> None:
    weight, gram = layer(1, 20, 8)
    start = random_codebook(6, 4)
    codes = torch.randint(0, 6, (20, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(solve_codebook(weight, codes, torch.zeros_like(gram), start)[0], start)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_sweep_tries_every_codeword_in_turn(groups: int) -> None:
    weight, gram = layer(groups, 6, 12)
    gram = damped(gram, 0.01)
    codebook = random_codebook(8, 4)
    codes = torch.randint(0, 8, (6 * groups, 3), generator=torch.Generator().manual_seed(2))
    found, changed = refine_codes(weight, codebook, codes, gram)
    expected = codes.clone()
    for row in range(len(weight)):
        for block in range(3):
            losses = []
            for word in range(8):
                tried = expected[row : row + 1].clone()
                tried[0, block] = word
                own = gram[row // 6 : row // 6 + 1]
                losses.append(literal_objective(weight[row : row + 1], codebook, tried, own))
            expected[row, block] = losses.index(min(losses))
    assert torch.equal(found, expected)
    assert changed == int((expected != codes).sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_objective_never_rises(dtype: torch.dtype) -> None:
    weight, gram = layer(2, 100, 40, seed=5)
    weight, gram = weight.to(dtype), damped(gram, 0.01)
    codebook = random_codebook(32, 4).to(dtype)
    codes = encode_with_feedback(weight, codebook, gram, damping=0.01)
    losses = [output_objective(weight, codebook, codes, gram)]
    for _ in range(12):
        codebook, _ = solve_codebook(weight, codes, gram, codebook)
        losses.append(output_objective(weight, codebook, codes, gram))
        codes, changed = refine_codes(weight, codebook, codes, gram)
        losses.append(output_objective(weight, codebook, codes, gram))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert changed < 100


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("iterations", [0, 3])
def test_a_sweep_goes_on_from_the_slope_of_the_codebook(groups: int, iterations: int) -> None:
    weight, gram = layer(groups, 6, 12)
    gram = damped(gram, 0.01)
    codes = torch.randint(0, 8, (6 * groups, 3), generator=torch.Generator().manual_seed(2))
    start = random_codebook(8, 4)
    codebook, slope = solve_codebook(weight, codes, gram, start, iterations=iterations)
    assert torch.equal(codebook, start) == (iterations == 0)
    away = (weight - codebook[codes].flatten(1)).reshape(groups, 6, 12)
    torch.testing.assert_close(slope, away @ gram)
    found, changed = refine_codes(weight, codebook, codes, gram)
    further, number = refine_codes(weight, codebook, codes, gram, slope=slope)
    assert torch.equal(found, further) and changed == number
