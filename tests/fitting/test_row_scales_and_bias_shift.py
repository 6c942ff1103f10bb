"""Row scales against their definition, within what the norm and the weight's type take; shifts match the means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin.fitting import LayerContext
from bgd_plugin.fitting.row_scales_and_bias_shift import equal_rows, matching_bias
from bgd_plugin.pq.gram import Moments
from tests.pq.test_target_asymmetric import drifted_layer


def _context(weight: Tensor, **fields: Any) -> LayerContext:
    planned: Any = None
    inputs: Any = None
    common = {
        "layer": planned,
        "inputs": inputs,
        "has_batchnorm": True,
        "has_bias": False,
        "config": bgd.BGDConfig(max_divergence=None),
    }
    return LayerContext(weight=weight, **(common | fields))


def _covariances(groups: int, columns: int) -> Tensor:
    x = torch.randn(groups, 3 * columns, columns, dtype=torch.float64)
    return x.mT @ x / (3 * columns)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_rows_scale_is_one_over_the_deviation_of_its_outputs(groups: int) -> None:
    rows, covariance = torch.randn(6, 5), _covariances(groups, 5)
    rows[1] *= 1e-9  # next to nothing, as a dead channel
    per_row = covariance.repeat_interleave(6 // groups, 0)
    deviation = torch.einsum("ri,rij,rj->r", rows.double(), per_row, rows.double()).sqrt()
    deviation[1] = deviation.mean()
    found = equal_rows(rows, covariance, _context(rows))
    torch.testing.assert_close(found.double(), 1 / deviation, rtol=1e-5, atol=0)


def test_a_rows_scale_stays_where_the_norm_can_take_it_out_again() -> None:
    rows, covariance = torch.randn(4, 5), _covariances(1, 5)
    free = equal_rows(rows, covariance, _context(rows))
    least, largest = 2 * free, 3 * free
    least[0], largest[1] = 0.5 * free[0], 0.25 * free[1]
    least[1] = 0.1 * free[1]
    found = equal_rows(rows, covariance, _context(rows, scale_bounds=(least.double(), largest.double())))
    torch.testing.assert_close(found, torch.stack([free[0], 0.25 * free[1], 2 * free[2], 2 * free[3]]))


def test_scaled_rows_stay_within_the_weights_type() -> None:
    """Inputs that hardly vary ask for scales that half precision does not hold; nothing asks for more than 1e30."""
    rows, covariance = 100 * torch.randn(4, 5), 1e-12 * _covariances(1, 5)
    free = equal_rows(rows, covariance, _context(rows))
    assert float((rows.abs().amax(1) * free).max()) > 65504 / 4
    found = equal_rows(rows, covariance, _context(rows.half()))
    torch.testing.assert_close(found.double() * rows.double().abs().amax(1), torch.full((4,), 65504.0 / 4).double())
    tiny = equal_rows(1e-38 * rows, covariance, _context(rows))
    assert bool((tiny == 1e30).all())
    nothing = equal_rows(torch.zeros(4, 5), covariance, _context(rows))
    assert bool(torch.isfinite(nothing).all()) and bool((nothing > 0).all())


def test_the_bias_matches_the_means() -> None:
    inputs, weight, outputs = drifted_layer(2)
    moments = Moments.of(inputs, outputs)
    bias = matching_bias(weight, moments.mean, moments.output_mean).reshape(2, 1, 7)
    produced = inputs @ weight.reshape(2, 7, 12).mT + bias
    torch.testing.assert_close(produced.mean(1), outputs.mean(1))
