"""The fits of pruned weights, against what the formulas say word by word."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import damped, encode_damped
from bgd_plugin.pq.full_gram import fit_full
from bgd_plugin.pq.least_squares import output_objective, refine_codes, solve_codebook
from bgd_plugin.pq.masked import codeword_uses, fit_em_masked, fit_masked, nearest_masked
from tests.encoding.test_masks import n_of_m
from tests.oracles import reconstruction_objective
from tests.pq.test_feedback import layer, random_codebook
from tests.pq.trails import watched_trails


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _metrics(positions: int, width: int) -> Tensor:
    x = torch.randn(positions, 3 * width, width, generator=_generator(5))
    return x.mT @ x


def _blocks(positions: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    mask = torch.rand(positions, count, width, generator=_generator(1)) < 0.6
    return torch.randn(positions, count, width, generator=_generator(2)) * mask, mask


def test_the_nearest_codeword_is_the_one_a_search_finds() -> None:
    blocks, mask = _blocks(3, 50, 5)
    points = blocks + 0.3 * torch.randn(blocks.shape, generator=_generator(3))
    metrics, words = _metrics(3, 5), torch.randn(16, 5, generator=_generator(4))
    difference = points.unsqueeze(2) - mask.unsqueeze(2) * words
    distances = torch.einsum("pnki,pij,pnkj->pnk", difference, metrics, difference)
    assert torch.equal(nearest_masked(points, metrics, words, mask), distances.argmin(2))


def test_the_objective_never_rises_and_pruned_places_do_not_count() -> None:
    blocks, mask = _blocks(4, 200, 4)
    losses = []
    for iterations in (1, 2, 3, 5, 8, 30):
        codebook, codes = fit_masked(blocks, _metrics(4, 4), mask, 32, iterations, generator=_generator())
        difference = blocks - codebook[codes] * mask
        losses.append(float(torch.einsum("pni,pij,pnj->", difference, _metrics(4, 4), difference)))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_a_codeword_is_the_mean_of_what_is_kept_where_all_directions_count_the_same() -> None:
    blocks, mask = _blocks(1, 300, 4)
    metrics = torch.eye(4).unsqueeze(0)
    codebook, codes = fit_masked(blocks, metrics, mask, 8, 100, generator=_generator())
    uses = codeword_uses(codes, mask, 8, 4)
    sums = torch.zeros(8, 4).index_add_(0, codes.flatten(), blocks.flatten(0, 1))
    assert uses.min() > 0
    torch.testing.assert_close(codebook, sums / uses, rtol=1e-3, atol=1e-3)


def test_uses_without_a_mask_count_blocks() -> None:
    codes = torch.tensor([[0, 2], [2, 2]])
    assert codeword_uses(codes, None, 4, 3).tolist() == [[1] * 3, [0] * 3, [3] * 3, [0] * 3]


def test_a_whole_mask_gives_an_em_as_good_as_without() -> None:
    weight, gram = layer(1, 64, 32)
    blocks = weight.float().reshape(64, 8, 4)
    pooled = gram[0, :4, :4].float()
    whole = torch.ones_like(blocks, dtype=torch.bool)
    ours = fit_em_masked(blocks, pooled, whole, 16, 60, generator=_generator())
    theirs = fit_em(blocks, pooled, 16, 60, generator=_generator())
    found, expected = (reconstruction_objective(blocks, fit.codebook, fit.codes, pooled) for fit in (ours, theirs))
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0.0, 0.0, 2.0]))])
def test_inputs_without_energy_and_rows_without_weights_are_fitted(gram: Tensor) -> None:
    blocks, mask = _blocks(32, 4, 4)
    blocks[3], mask[3] = 0, False
    fit = fit_em_masked(blocks, gram, mask, 16, 20, generator=_generator())
    assert torch.isfinite(fit.codebook).all()
    assert fit.codes.shape == (32, 4)


def test_nothing_but_zeros_is_fitted() -> None:
    blocks = torch.zeros(32, 4, 4)
    fit = fit_em_masked(blocks, torch.eye(4), torch.zeros(32, 4, 4, dtype=torch.bool), 16, 20, generator=_generator())
    assert not fit.codebook[fit.codes].any()
    assert torch.isfinite(fit.codebook).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_whole_mask_changes_nothing_in_the_full_fit(groups: int) -> None:
    weight, gram = layer(groups, 40, 32)
    whole, words = torch.ones_like(weight, dtype=torch.bool), random_codebook(16, 4)
    hessian = damped(gram, 0.1)
    codes = encode_damped(weight, words, hessian)
    assert torch.equal(encode_damped(weight, words, hessian, whole), codes)
    solved, _ = solve_codebook(weight, codes, hessian, words)
    torch.testing.assert_close(solve_codebook(weight, codes, hessian, words, mask=whole)[0], solved)
    refined = refine_codes(weight, solved, codes, hessian)[0]
    assert torch.equal(refine_codes(weight, solved, codes, hessian, whole)[0], refined)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_full_fit_of_a_pruned_weight_never_gets_worse(groups: int) -> None:
    weight, gram = layer(groups, 60, 32)
    mask = n_of_m(tuple(weight.shape), 2, 4)
    with watched_trails() as trails:
        fit = fit_full(weight * mask, gram, None, 32, 4, damping=0.01, rounds=4, mask=mask, generator=_generator())
    (trail,) = trails
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(trail.history))
    decoded = fit.codebook[fit.codes].reshape(weight.shape) * mask
    difference = ((weight * mask - decoded).reshape(groups, -1, 32)).double()
    literal = float(((difference @ damped(gram, 0.01).double()) * difference).sum())
    assert trail.objectives(weight * mask, damped(gram, 0.01))[trail.chosen] == pytest.approx(literal, rel=1e-6)


def test_a_fit_that_knows_the_mask_beats_one_that_is_masked_afterwards() -> None:
    weight, gram = layer(1, 128, 64)
    mask = n_of_m(tuple(weight.shape), 2, 4)
    pruned = weight * mask
    knowing = fit_full(pruned, gram, None, 32, 4, mask=mask, generator=_generator())
    ignorant = fit_full(pruned, gram, None, 32, 4, generator=_generator())
    afterwards = output_objective(pruned, ignorant.codebook, ignorant.codes, gram, mask=mask)
    assert output_objective(pruned, knowing.codebook, knowing.codes, gram, mask=mask) < 0.6 * afterwards
