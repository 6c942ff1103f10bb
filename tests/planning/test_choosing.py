"""Errors tried together: the network with them, and what the choice makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import front_end, set_modes
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.choosing import choose_sizes, energy_left, realized_energy
from bgd_plugin.planning.measure import Measurements, measured
from bgd_plugin.planning.survey import surveyed
from tests.networks import SmallResNet, images, randomized


def _measurements(model: nn.Module, data: list[torch.Tensor], config: bgd.BGDConfig) -> tuple[Budget, Measurements]:
    front = front_end(model, share_tensors=True)
    set_modes(front.network, {"": False})
    batches = collect_batches(data, model, device=torch.device("cpu"), forward=None)
    budget = Budget.of(surveyed(front, config, original=model))
    assert budget is not None
    return budget, measured(budget, batches, progress=False)


def _confident() -> tuple[nn.Module, list[torch.Tensor]]:
    model, data = randomized(SmallResNet()), images(4, batch=8)
    model.fc.weight.data *= 30
    return model, data


def test_trying_errors_leaves_the_network_as_it_is() -> None:
    model, data = _confident()
    before = copy.deepcopy(model.state_dict())
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05))
    survey = choose_sizes(budget, measurements, 0.25)
    assert survey.expected_divergence is not None
    assert measurements.joint(survey) == measurements.joint(survey) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_larger_errors_diverge_more_and_none_not_at_all() -> None:
    model, data = _confident()
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05))
    fine = budget.spend(measurements.sensitivities, 1000.0)
    coarse = budget.spend(measurements.sensitivities, 0.01)
    assert measurements.joint(fine) < measurements.joint(coarse)
    nothing = budget.survey.budgeted((), [], ())
    assert measurements.joint(nothing) == 0.0


@pytest.mark.parametrize("method", ["full", "em"])
def test_the_expectation_is_what_the_trial_found(method: str) -> None:
    """With a quarter of the energy, where the fit of a layer makes good what was lost before."""
    model, data = _confident()
    config = bgd.BGDConfig(max_divergence=0.05, method=method)  # type: ignore[arg-type]
    budget, measurements = _measurements(model, data, config)
    energy = energy_left(budget)
    assert energy == (0.25 if method == "full" else 1.0)
    survey = choose_sizes(budget, measurements, energy)
    assert survey.expected_divergence == measurements.joint(survey, energy)
    assert survey.expected_divergence <= 0.05 * 1.2
    assert survey.curve


def test_energy_scales_the_errors() -> None:
    model, data = _confident()
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05))
    survey = budget.spend(measurements.sensitivities, 1.0)
    small = [measurements.joint(survey, energy) for energy in (1e-4, 2e-4)]
    assert small[1] == pytest.approx(2 * small[0], rel=0.05)  # so small that nothing but the energy counts


@pytest.mark.parametrize("true", [0.02, 0.25, 1.5])
def test_the_energy_is_found_from_what_was_measured(true: float) -> None:
    model, data = _confident()
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05))
    survey = choose_sizes(budget, measurements, 0.25)
    measured = measurements.joint(survey, true)
    found = realized_energy(measurements, survey, 0.25, measured)
    assert measurements.joint(survey, found) == pytest.approx(measured, rel=0.1)
    assert found == pytest.approx(true, rel=0.3)


@pytest.mark.parametrize("measured", [0.0, float("inf"), float("nan")])
def test_nothing_is_learnt_from_a_divergence_that_is_none(measured: float) -> None:
    model, data = _confident()
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05))
    survey = choose_sizes(budget, measurements, 0.25)
    assert realized_energy(measurements, survey, 0.25, measured) == 0.25
