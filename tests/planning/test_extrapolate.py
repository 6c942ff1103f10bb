"""What an error costs when it is scaled, against networks in which it is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from bgd_plugin.planning.extrapolate import losses_by_error, shifted_logits


def test_a_scaled_error_costs_what_the_scaled_shift_of_the_logits_does() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(40, 6, generator=generator)
    shift = 0.1 * torch.randn(40, 6, generator=generator)
    pairs = losses_by_error([shifted_logits(logits + shift, logits, 10**6)], size=0.5, loss=1.0)
    assert len(pairs) > 5
    assert list(pairs) == sorted(pairs) and all(a[1] < b[1] for a, b in itertools.pairwise(pairs))
    for error, loss in pairs:
        moved = logits + (error / 0.5) ** 0.5 * shift
        true = functional.kl_div(moved.log_softmax(1), logits.softmax(1), reduction="batchmean")
        assert loss == pytest.approx(float(true), rel=1e-2, abs=1e-6)


def test_confident_answers_cost_more_than_in_proportion() -> None:
    logits = torch.tensor([[20.0, 0.0], [0.0, 20.0]])
    pairs = dict(losses_by_error([(logits.double(), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]).double())], 1.0, 0.0))
    assert pairs[64.0] > 500 * (64 / 16) * pairs[16.0]


def test_without_logits_the_loss_is_in_proportion() -> None:
    assert losses_by_error([], size=0.5, loss=0.25) == ((0.5, 0.25),)


def test_an_error_that_moves_nothing_costs_next_to_nothing() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    (pair,) = losses_by_error([(logits, torch.zeros_like(logits))], size=0.5, loss=0.0)
    assert 0 < pair[1] < 1e-20


def test_logits_of_pixels_and_tokens_are_rows_and_many_are_thinned() -> None:
    pixels = torch.randn(2, 3, 4, 5)
    logits, shift = shifted_logits(pixels + 1, pixels, 10**6)
    assert logits.shape == (40, 3)
    assert torch.allclose(shift, torch.ones_like(shift), atol=1e-5)
    assert torch.equal(logits[1].float(), pixels[0, :, 0, 1])
    assert shifted_logits(pixels, pixels, 60)[0].shape == (20, 3)


def test_the_points_end_behind_the_first_loss_that_no_bound_asks_for() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    shift = 0.5 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    losses = [loss for _, loss in losses_by_error([(logits, shift)], size=1.0, loss=0.0)]
    assert losses[-2] <= 1.0 < losses[-1] < 8.0
    assert losses[0] > 1e-6


def test_a_loss_that_cannot_be_computed_ends_the_points() -> None:
    logits = torch.zeros(2, 2, dtype=torch.float64)
    shift = torch.tensor([[1e-3, 0.0], [math.inf, 0.0]], dtype=torch.float64)
    assert losses_by_error([(logits, shift)], size=1.0, loss=0.0) == ((1.0, 1e-30),)


def test_an_error_without_a_loss_still_has_one_in_proportion() -> None:
    assert losses_by_error([], size=4.0, loss=0.0) == ((4.0, 4e-30),)


def test_samples_of_several_batches_count_together() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    shift = torch.randn(6, 3, dtype=torch.float64)
    whole = losses_by_error([(logits, shift)], 1.0, 0.0)
    parts = losses_by_error([(logits[:2], shift[:2]), (logits[2:], shift[2:])], 1.0, 0.0)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole))
