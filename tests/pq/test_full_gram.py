"""The full-Gram fit: its steps never lose, unseen inputs decide when it ends, groups and odd inputs work."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import damped, diagonal_blocks
from bgd_plugin.pq.full_gram import FullFit, fit_full
from bgd_plugin.pq.least_squares import output_objective
from tests.pq.test_feedback import layer
from tests.pq.trails import Trail, watched_trails


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fit(weight: Tensor, gram: Tensor, heldout: Tensor | None = None, size: int = 32, **settings: float) -> FullFit:
    rounds = int(settings.get("rounds", 4))
    damping = settings.get("damping", 0.01)
    return fit_full(weight, gram, heldout, size, 4, damping=damping, rounds=rounds, generator=_generator())


def _watched(*arguments: Any, **settings: float) -> tuple[FullFit, Trail]:
    """A fit, and the points that it went through."""
    with watched_trails() as trails:
        fit = _fit(*arguments, **settings)
    (trail,) = trails
    assert torch.equal(fit.codes, trail.best[1])
    return fit, trail


def _objective(fit: FullFit, weight: Tensor, gram: Tensor) -> float:
    return output_objective(weight, fit.codebook.to(weight), fit.codes, gram)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_objective_never_rises_and_is_the_literal_one(groups: int) -> None:
    weight, gram = layer(groups, 60, 32)
    fit, trail = _watched(weight, gram)
    history = trail.objectives(weight, damped(gram, 0.01))
    assert fit.codebook.shape == (32, 4)
    assert fit.codebook.dtype == weight.dtype
    assert fit.codes.shape == (60 * groups, 8)
    assert history[trail.chosen] == pytest.approx(_objective(fit, weight, damped(gram, 0.01)), rel=1e-9)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(history))
    assert len(history) >= 3
    assert history[trail.chosen] == min(history)
    assert fit.notes == ()


def test_it_beats_the_pooled_fit_on_unseen_inputs() -> None:
    weight, gram = layer(1, 128, 64, positions=2000)
    root = torch.linalg.cholesky(damped(gram, 1e-6)[0])
    unseen = root @ torch.randn(64, 3000, generator=_generator(99), dtype=torch.float64)
    heldout = (unseen @ unseen.T / 3000).unsqueeze(0)
    blocks = weight.reshape(128, 16, 4)
    pooled = diagonal_blocks(gram, 4).mean((0, 1))
    paper = fit_em(blocks, pooled, 64, 100, generator=_generator())
    ours = _fit(weight, gram, size=64)
    theirs = output_objective(weight, paper.codebook, paper.codes, heldout)
    assert output_objective(weight, ours.codebook, ours.codes, heldout) < 0.75 * theirs


def test_heldout_rows_decide() -> None:
    """Few inputs, next to no damping: the fitted loss goes on falling while the loss on unseen inputs rises."""
    weight, gram = layer(1, 100, 48, seed=3, positions=30)
    _, heldout = layer(1, 100, 48, seed=3, positions=5000)
    free, unwatched = _watched(weight, gram, rounds=6, damping=1e-3)
    watched, trail = _watched(weight, gram, heldout, rounds=6, damping=1e-3)
    judged = trail.heldout_objectives(weight)
    assert len(judged) == len(trail.history)
    assert judged[trail.chosen] == min(judged)
    assert trail.chosen < unwatched.chosen
    losses = [output_objective(weight, fit.codebook, fit.codes, heldout) for fit in (watched, free)]
    assert losses[0] < losses[1]
    assert judged[trail.chosen] == pytest.approx(losses[0], rel=1e-9)
    assert _objective(watched, weight, gram) > _objective(free, weight, gram)
    assert len(trail.history) < len(unwatched.history)


def test_another_heldout_gram_gives_another_choice() -> None:
    weight, gram = layer(1, 100, 48, seed=3, positions=30)
    _, same = _watched(weight, gram, gram, rounds=6, damping=1e-3)
    _, heldout = layer(1, 100, 48, seed=3, positions=5000)
    _, other = _watched(weight, gram, heldout, rounds=6, damping=1e-3)
    assert same.chosen > other.chosen


def test_the_same_seed_gives_the_same_codes() -> None:
    weight, gram = layer(2, 40, 16)
    first, second = _fit(weight, gram), _fit(weight, gram)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebook, second.codebook)


def test_neither_weight_nor_gram_is_changed() -> None:
    weight, gram = layer(2, 40, 16)
    copies = weight.clone(), gram.clone()
    _fit(weight, gram, gram)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight, gram = layer(1, 60, 32)
    exact, found = _fit(weight, gram), _fit(weight.to(dtype), gram.float())
    assert found.codebook.dtype == dtype
    assert _objective(found, weight, gram) == pytest.approx(_objective(exact, weight, gram), rel=0.1)


def test_depthwise_layer_has_a_gram_for_each_row() -> None:
    weight, gram = layer(48, 1, 8)
    fit = _fit(weight, gram, size=16)
    blind = _fit(weight, torch.eye(8, dtype=torch.float64).expand(48, 8, 8), size=16)
    assert _objective(fit, weight, gram) < 0.8 * output_objective(weight, blind.codebook, blind.codes, gram)


def test_dead_inputs_and_dead_rows() -> None:
    weight, gram = layer(1, 40, 16)
    weight[:10] = 0
    gram[:, 3:9] = 0
    gram[:, :, 3:9] = 0
    fit = _fit(weight, gram)
    assert bool(torch.isfinite(fit.codebook).all())
    assert fit.notes == ("6 of 16 input columns are constant",)
    silent = _fit(weight, torch.zeros_like(gram))
    assert bool(torch.isfinite(silent.codebook).all())


def test_fewer_distinct_blocks_than_codewords() -> None:
    weight, gram = torch.ones(40, 16, dtype=torch.float64), layer(1, 40, 16)[1]
    fit = _fit(weight, gram)
    assert _objective(fit, weight, gram) == pytest.approx(0, abs=1e-12)
    used = len(fit.codes.unique())
    assert used <= 2
    assert fit.notes == (f"{32 - used} of 32 codewords are not used",)


def test_what_cannot_be_fitted_is_refused() -> None:
    weight, gram = layer(1, 10, 12)
    with pytest.raises(ValueError, match="30 blocks are fewer than 31 codewords"):
        _fit(weight, gram, size=31)
    with pytest.raises(ValueError, match="12 weights per row do not divide into blocks of 5"):
        fit_full(weight, gram, None, 4, 5, generator=_generator())
    with pytest.raises(ValueError, match="the weights hold NaN or Inf"):
        _fit(weight * float("nan"), gram)
    with pytest.raises(ValueError, match="the inputs hold NaN or Inf"):
        _fit(weight, gram * float("inf"))
