"""EM in Gram space against the paper's EM written out, and on inputs without full rank."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.em import Fit, fit_em
from tests.oracles import SHAPES, correlated_layer, literal_em, literal_least_squares, reconstruction_objective


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(shape: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return correlated_layer(SHAPES[shape], images=2, size=8, dtype=dtype)


def _check(blocks: Tensor, fit: Fit, codebook_size: int) -> None:
    """Shapes, ranges, finiteness, and codewords are means of their blocks."""
    assert fit.codebook.shape == (codebook_size, blocks.shape[2])
    assert fit.codebook.dtype == blocks.dtype
    assert fit.codes.shape == blocks.shape[:2]
    assert fit.codes.dtype == torch.int64
    assert bool(torch.isfinite(fit.codebook).all())
    for code in set(fit.codes.flatten().tolist()):
        torch.testing.assert_close(fit.codebook[code], blocks[fit.codes == code].mean(0), atol=1e-5, rtol=1e-5)


def _objective(fit: Any, blocks: Tensor, gram: Tensor) -> float:
    return reconstruction_objective(blocks, fit.codebook, fit.codes, gram)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_papers_em(shape: str) -> None:
    blocks, activations = _layer(shape)
    gram = activations.T @ activations
    fast = fit_em(blocks, gram, 24, 15, generator=_generator(3))
    literal = literal_em(blocks, activations, 24, 15, generator=_generator(3))
    assert torch.equal(fast.codes, literal.codes)
    assert _objective(fast, blocks, gram) == pytest.approx(_objective(literal, blocks, gram), rel=1e-6)
    torch.testing.assert_close(fast.codebook, literal.codebook, rtol=1e-6, atol=1e-8)
    _check(blocks, fast, 24)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_iteration_raises_the_objective(shape: str) -> None:
    blocks, activations = _layer(shape)
    gram = activations.T @ activations
    fits = [fit_em(blocks, gram, 24, iterations, generator=_generator(3)) for iterations in range(1, 12)]
    objectives = [_objective(fit, blocks, gram) for fit in fits]
    assert all(later <= earlier for earlier, later in itertools.pairwise(objectives))
    assert objectives[-1] < 0.9 * objectives[0]


def test_it_is_the_papers_em_when_clusters_start_empty() -> None:
    blocks, activations = _layer("1x1 d=4")
    blocks = blocks[:16, :4].repeat(4, 3, 1)
    blocks += 1e-3 * torch.randn(blocks.shape, generator=_generator(1), dtype=blocks.dtype)
    blocks[:, 4:] = blocks[0, 0]  # two thirds of the blocks are one: most of the start falls on it
    gram = activations.T @ activations
    fast = fit_em(blocks, gram, 48, 8, generator=_generator(3))
    literal = literal_em(blocks, activations, 48, 8, generator=_generator(3))
    assert torch.equal(fast.codes, literal.codes)
    assert _objective(fast, blocks, gram) == pytest.approx(_objective(literal, blocks, gram), rel=1e-6)
    assert len(set(fast.codes.flatten().tolist())) == 48


def test_the_m_step_solves_the_stacked_systems() -> None:
    blocks, activations = _layer("3x3 d=9")
    members = blocks[0, :7]
    stacked = activations.repeat(7, 1)
    targets = torch.cat([activations @ member for member in members])
    expected = torch.linalg.lstsq(stacked, targets.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(literal_least_squares(activations, members), expected)
    torch.testing.assert_close(members.mean(0), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_comes_close(shape: str) -> None:
    blocks, activations = _layer(shape)
    gram = activations.T @ activations
    double = fit_em(blocks, gram, 32, 25, generator=_generator(3))
    single = fit_em(blocks.float(), gram.float(), 32, 25, generator=_generator(3))
    _check(blocks.float(), single, 32)
    found, expected = (_objective(fit, blocks, gram) for fit in (single, double))
    assert found == pytest.approx(expected, rel=0.02)


def test_it_beats_what_ignores_the_inputs() -> None:
    blocks, activations = _layer("3x3 d=9")
    gram = activations.T @ activations
    ours = fit_em(blocks, gram, 32, 50, generator=_generator())
    plain = fit_em(blocks, torch.eye(9), 32, 50, generator=_generator())
    assert _objective(ours, blocks, gram) < 0.9 * _objective(plain, blocks, gram)


def test_only_the_directions_the_inputs_show_count() -> None:
    """A Gram of rank one and one of rank d − 1 (a dead channel), in the precision that networks come in."""
    blocks, activations = _layer("1x1 d=4", torch.float32)
    dead = activations * torch.tensor([1.0, 1.0, 0.0, 1.0])
    flat = activations[:, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0])
    for inputs in (dead, flat):
        gram = inputs.T @ inputs
        fit = fit_em(blocks, gram, 32, 50, generator=_generator())
        _check(blocks, fit, 32)
        plain = fit_em(blocks, torch.eye(4), 32, 50, generator=_generator())
        assert _objective(fit, blocks, gram) < 0.9 * _objective(plain, blocks, gram)


def test_directions_without_energy_decide_between_what_is_equal_otherwise() -> None:
    """The inputs show the first of four weights only, and that one has two values: 30 codewords are left over."""
    blocks = torch.randn(64, 8, 4, generator=_generator())
    blocks[..., 0] = blocks[..., 0].sign()
    gram = torch.diag(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    fit = fit_em(blocks, gram, 32, 50, generator=_generator())
    assert _objective(fit, blocks, gram) < 1e-6
    assert len(set(fit.codes.flatten().tolist())) == 32
    hidden = (blocks - fit.codebook[fit.codes])[..., 1:].square().mean()
    assert hidden < 0.5 * blocks[..., 1:].square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_zero_mean_plain_k_means(dtype: torch.dtype) -> None:
    blocks, _ = _layer("3x3 d=9", dtype)
    zero = fit_em(blocks, torch.zeros(9, 9, dtype=dtype), 32, 50, generator=_generator())
    plain = fit_em(blocks, torch.eye(9, dtype=dtype), 32, 50, generator=_generator())
    _check(blocks, zero, 32)
    assert (zero.codes == plain.codes).float().mean() > 0.99


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_inputs_does_not_matter(scale: float) -> None:
    blocks, activations = _layer("1x1 d=4", torch.float32)
    gram = (activations.T @ activations).double()
    fit = fit_em(blocks, gram * scale, 32, 50, generator=_generator())
    expected = fit_em(blocks, gram, 32, 50, generator=_generator())
    assert (fit.codes == expected.codes).float().mean() > 0.99
    assert _objective(fit, blocks, gram) == pytest.approx(_objective(expected, blocks, gram), rel=1e-3)


def test_fewer_distinct_blocks_than_codewords_are_kept_exactly() -> None:
    blocks = torch.randn(5, 1, 4).repeat(8, 6, 1)
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    fit = fit_em(blocks, gram, 16, 50, generator=_generator())
    _check(blocks, fit, 16)
    torch.testing.assert_close(fit.codebook[fit.codes], blocks)


def test_weights_of_zero_give_codewords_of_zero() -> None:
    fit = fit_em(torch.zeros(8, 6, 4), torch.eye(4), 16, 50, generator=_generator())
    assert not fit.codebook.any()


def test_half_precision_blocks_get_a_codebook_of_theirs() -> None:
    blocks, activations = _layer("1x1 d=4", torch.float32)
    fit = fit_em(blocks.bfloat16(), activations.T @ activations, 32, 10, generator=_generator())
    assert fit.codebook.dtype == torch.bfloat16


def test_gradients_and_inputs_stay_as_they_were() -> None:
    blocks, activations = _layer("1x1 d=4", torch.float32)
    parameter = torch.nn.Parameter(blocks.clone())
    fit = fit_em(parameter, activations.T @ activations, 32, 10, generator=_generator())
    assert not fit.codebook.requires_grad
    assert torch.equal(parameter, blocks)


def test_it_says_what_is_wrong() -> None:
    blocks, gram = torch.zeros(3, 5, 4), torch.eye(4)
    nan = torch.full((4, 4), float("nan"))
    with pytest.raises(ValueError, match="15 blocks are fewer than 16 codewords"):
        fit_em(blocks, gram, 16, 1, generator=_generator())
    with pytest.raises(ValueError, match=r"Gram is \(3, 3\) and does not suit blocks of 4"):
        fit_em(blocks, torch.eye(3), 4, 1, generator=_generator())
    with pytest.raises(ValueError, match="the inputs hold NaN or Inf"):
        fit_em(blocks, nan, 4, 1, generator=_generator())
    with pytest.raises(ValueError, match="the weights hold NaN or Inf"):
        fit_em(blocks + float("inf"), gram, 4, 1, generator=_generator())
