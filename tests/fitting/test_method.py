"""What is said of a fit: the error of a layer's outputs, what a bias gained, and what all processes are told."""

from __future__ import annotations

import math

import pytest
import torch

from bgd_plugin.calibration import InputSample
from bgd_plugin.fitting import FittedLayer, fitted_once, output_error, shift_gain


def _case(groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, InputSample]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    decoded = weight + 0.1 * torch.randn(6, 5, generator=generator)
    return weight, decoded, InputSample(rows=torch.randn(groups, 40, 5, generator=generator) + 1)


def test_the_error_is_that_of_the_outputs_in_units_of_their_squares() -> None:
    weight, decoded, sample = _case()
    lost = kept = 0.0
    for group in range(2):
        rows, w, d = sample.rows[group].double(), weight[3 * group :][:3].double(), decoded[3 * group :][:3].double()
        lost += float((rows @ (w - d).T).square().sum())
        kept += float((rows @ w.T).square().sum())
    assert output_error(weight, decoded, sample) == pytest.approx(lost / kept, rel=1e-5)


def test_outputs_of_nothing_have_no_error_and_neither_have_those_beyond_all_bounds() -> None:
    weight, decoded, sample = _case()
    assert output_error(torch.zeros(6, 5), decoded, sample) == 0.0
    assert output_error(weight * math.inf, decoded, sample) == 0.0
    assert output_error(weight, weight, sample) == 0.0
    huge = torch.full((6, 5), 3e38)
    assert output_error(huge, torch.zeros(6, 5), InputSample(rows=torch.full((2, 40, 5), 10.0))) == 0.0


def test_a_shifts_gain_is_its_square_in_units_of_the_outputs_variance() -> None:
    weight, _, sample = _case()
    shift = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.25, 1.0])
    outputs = torch.cat([sample.rows[g].double() @ weight[3 * g :][:3].double().T for g in range(2)], dim=1)
    variance = (outputs - outputs.mean(0)).square().sum()
    assert shift_gain(shift, weight, sample) == pytest.approx(
        float(40 * shift.double().square().sum() / variance), rel=1e-5
    )
    assert shift_gain(shift, torch.zeros(6, 5), sample) == 0.0
    assert shift_gain(shift, weight * math.inf, sample) == 0.0
    assert shift_gain(1e200 * shift.double(), 1e30 * weight, sample) == 0.0


def test_what_one_process_fits_is_what_all_get() -> None:
    fit = FittedLayer(
        codebook=torch.randn(4, 2),
        codes=torch.randint(0, 4, (3, 5)),
        bias_shift=torch.randn(3),
        warnings=("1 of 4 codewords are not used",),
    )
    found = fitted_once(lambda: fit)
    assert found is not None
    assert torch.equal(found.codebook, fit.codebook) and torch.equal(found.codes, fit.codes)
    assert found.row_scale is None and found.bias_shift is not None and torch.equal(found.bias_shift, fit.bias_shift)  # type: ignore[arg-type]
    assert found.warnings == fit.warnings
    assert fitted_once(lambda: None) is None
