"""The asymmetric target against ridge regression on explicit rows, and that it does what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgd_plugin.fitting.row_scales_and_bias_shift import matching_bias
from bgd_plugin.pq.gram import Moments
from bgd_plugin.pq.target_asymmetric import asymmetric_target, best_step, ridge_change


def drifted_layer(groups: int = 1, positions: int = 400, columns: int = 12, rows: int = 7) -> tuple[Tensor, ...]:
    """Student inputs `[groups, positions, columns]`, a weight, and the outputs on inputs that have not drifted."""
    generator = torch.Generator().manual_seed(4)
    clean = torch.randn(groups, positions, columns, generator=generator, dtype=torch.float64).relu()
    mixing = torch.eye(columns) + 0.2 * torch.randn(groups, columns, columns, generator=generator)
    noise = 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups * rows, columns, generator=generator, dtype=torch.float64)
    outputs = clean @ weight.reshape(groups, rows, columns).mT + 0.3
    return clean @ mixing.double() + noise, weight, outputs


@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_ridge_regression_centred_on_the_weight(groups: int) -> None:
    inputs, weight, outputs = drifted_layer(groups)
    target = asymmetric_target(weight, *Moments.of(inputs, outputs).around_mean(), step=1.0, damping=0.05).reshape(
        groups, 7, 12
    )
    for group, rows in enumerate(weight.reshape(groups, 7, 12)):
        centred = inputs[group] - inputs[group].mean(0)
        wanted = outputs[group] - outputs[group].mean(0)
        count = len(centred)
        level = 0.05 * (1 + 1e-4) * float((centred.T @ centred / count).diagonal().mean())
        system = torch.cat([centred, (count * level) ** 0.5 * torch.eye(12, dtype=torch.float64)])
        side = torch.cat([wanted - centred @ rows.T, torch.zeros(12, 7, dtype=torch.float64)])
        expected = rows + torch.linalg.lstsq(system, side).solution.T
        torch.testing.assert_close(target[group], expected, rtol=1e-8, atol=1e-10)


def test_the_step_is_a_fraction_of_the_way() -> None:
    inputs, weight, outputs = drifted_layer()
    moments = Moments.of(inputs, outputs)
    whole, half = (asymmetric_target(weight, *moments.around_mean(), step=step) for step in (1.0, 0.5))
    torch.testing.assert_close(half, (weight + whole) / 2)
    assert torch.equal(asymmetric_target(weight, *moments.around_mean(), step=0.0), weight)


def test_it_brings_the_outputs_nearer_on_unseen_positions() -> None:
    inputs, weight, outputs = drifted_layer(positions=1200)
    moments = Moments.of(inputs[:, :600], outputs[:, :600])

    def error(candidate: Tensor) -> float:
        bias = matching_bias(candidate, moments.mean, moments.output_mean)
        return float((inputs[:, 600:] @ candidate.T + bias - outputs[:, 600:]).square().sum())

    half, whole = (asymmetric_target(weight, *moments.around_mean(), step=step) for step in (0.5, 1.0))
    assert error(whole) < error(half) < 0.6 * error(weight)


def test_without_drift_it_is_the_weight() -> None:
    inputs, weight, _ = drifted_layer()
    outputs = inputs @ weight.T + 5
    torch.testing.assert_close(asymmetric_target(weight, *Moments.of(inputs, outputs).around_mean(), step=1.0), weight)


def test_dead_inputs_keep_the_weight_and_its_dtype() -> None:
    _, weight, outputs = drifted_layer()
    target = asymmetric_target(weight.float(), *Moments.of(torch.zeros(1, 400, 12).double(), outputs).around_mean())
    assert torch.equal(target, weight.float())
    assert target.dtype == torch.float32
    with pytest.raises(ValueError, match="damping above 0"):
        asymmetric_target(weight, *Moments.of(torch.zeros(1, 400, 12).double(), outputs).around_mean(), damping=0.0)


def test_the_best_step_has_the_least_error_on_the_inputs_that_judge() -> None:
    inputs, weight, outputs = drifted_layer(positions=50)
    fitted, judging = Moments.of(inputs[:, :30], outputs[:, :30]), Moments.of(inputs[:, 30:], outputs[:, 30:])
    change = ridge_change(weight, *fitted.around_mean(), damping=0.05)
    found = best_step(weight, change, *judging.around_mean())

    def error(step: float) -> float:
        away = (outputs - inputs @ (weight + step * change[0].mT).T)[:, 30:]
        return float((away - away.mean(1, keepdim=True)).square().sum())

    steps = [0.01 * i for i in range(101)]
    assert found == pytest.approx(min(steps, key=error), abs=0.006)
    assert 0.3 < found < 1


def test_noise_is_not_aimed_at() -> None:
    """Outputs that have nothing to do with the inputs: what few rows seem to show does not hold for others."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 200, 40, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    outputs = inputs @ weight.T + torch.randn(1, 200, 5, generator=generator, dtype=torch.float64)
    fitted, judging = Moments.of(inputs[:, :50], outputs[:, :50]), Moments.of(inputs[:, 50:], outputs[:, 50:])
    change = ridge_change(weight, *fitted.around_mean(), damping=0.2)
    assert best_step(weight, change, *judging.around_mean()) < 0.1
    assert best_step(weight, torch.zeros_like(change), *judging.around_mean()) == 1.0


@pytest.mark.parametrize("unit", [1e-18, 1.0, 1e15])
def test_single_precision_gives_the_same_change_whatever_the_units(unit: float) -> None:
    """With columns of all sizes, of which some see almost nothing, and outputs of any size."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-4, 0, 40) * unit
    inputs = torch.randn(2, 60, 40, generator=generator).relu() * sizes
    outputs, weight = torch.randn(2, 60, 5, generator=generator), torch.randn(10, 40, generator=generator) / unit
    change = ridge_change(weight, *Moments.of(inputs, outputs).around_mean(), damping=0.2)
    exact = ridge_change(weight.double(), *Moments.of(inputs.double(), outputs.double()).around_mean(), damping=0.2)
    assert change.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(change.double() * sizes[:, None], exact * sizes[:, None], rtol=1e-3, atol=1e-4)
