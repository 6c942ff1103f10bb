"""Errors tried together: the network with them, and what the choice makes of it."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import front_end, set_modes
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.choosing import choose_sizes, energy_at, energy_left, realized_energy
from bgd_plugin.planning.measure import Measurements, measured
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.planning.types import CurvePoint
from tests.networks import PlainNet, SmallResNet, images, randomized


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
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05, weight_storage="float32"))
    fine = budget.spend(measurements.sensitivities, 1000.0)
    coarse = budget.spend(measurements.sensitivities, 0.01)
    assert measurements.joint(fine) < measurements.joint(coarse)
    nothing = budget.survey.budgeted((), {}, ())
    assert measurements.joint(nothing) == 0.0


@pytest.mark.parametrize("method", ["full", "em"])
def test_the_expectation_is_what_the_trial_found(method: str) -> None:
    """With a third of the energy, where the fit of a layer makes good what was lost before."""
    model, data = _confident()
    config = bgd.BGDConfig(max_divergence=0.05, method=method)  # type: ignore[arg-type]
    budget, measurements = _measurements(model, data, config)
    energy = energy_left(budget)
    assert energy == (pytest.approx(1 / 3) if method == "full" else 1.0)
    survey = choose_sizes(budget, measurements, energy)
    assert survey.expected_divergence == measurements.joint(survey, energy)
    assert survey.expected_divergence <= 0.05 * 1.2
    assert survey.curve


def test_energy_scales_the_errors() -> None:
    model, data = _confident()
    budget, measurements = _measurements(model, data, bgd.BGDConfig(max_divergence=0.05))
    survey = budget.spend(measurements.sensitivities, 1.0)
    small = [measurements.joint(survey, energy) for energy in (1.6e-3, 3.2e-3)]
    assert small[1] == pytest.approx(2 * small[0], rel=0.05)  # small, and far above what rounding costs


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


# --- the search, with losses and trials that are made up


@dataclasses.dataclass
class _MadeUp:
    """A budget whose choices lose what is given, in turn."""

    survey: Survey
    losses: list[float]
    target_bytes: int | None = None
    scale: float = 1.0
    beside: tuple[Any, ...] = ()
    factors: list[float] = dataclasses.field(default_factory=list)
    drawn: list[float] = dataclasses.field(default_factory=list)

    def spend(self, _: Any, factor: float) -> Survey:
        self.factors.append(factor)
        return dataclasses.replace(
            self.survey, expected_divergence=self.losses[len(self.factors) - 1] * factor * self.scale
        )

    def curve(self, _: Any, factor: float) -> tuple[CurvePoint, ...]:
        self.drawn.append(factor)
        return (CurvePoint(file_bytes=1, expected_divergence=factor),)


def _search(losses: list[float], tried: list[float], **fields: Any) -> tuple[Survey, Any]:
    """The survey at the end, and the budget, which knows the factors under which sizes were chosen."""
    model = PlainNet().eval()
    budget: Any = _MadeUp(surveyed(front_end(model), bgd.BGDConfig(), original=model), losses, **fields)

    def joint(_: Survey, energy: float) -> float:
        assert energy == 0.5
        return tried[len(budget.factors) - 1]

    measurements: Any = SimpleNamespace(sensitivities={}, joint=joint, scale=1.0)
    return choose_sizes(budget, measurements, 0.5), budget


def test_sizes_are_chosen_again_under_what_a_trial_has_shown_until_one_is_near() -> None:
    """Expected 0.01, found 0.02; then expected 0.01, found 0.0105, which is near enough."""
    survey, budget = _search([0.02, 0.01], [0.02, 0.0105])
    assert budget.factors == pytest.approx([0.5, 1.0]) and budget.drawn == pytest.approx([1.05])
    assert survey.expected_divergence == pytest.approx(0.0105)
    assert survey.curve[0].expected_divergence == budget.drawn[0]


def test_the_search_ends_after_four_trials() -> None:
    survey, budget = _search([0.02] * 5, [0.02, 0.04, 0.08, 0.16, 0.32])
    assert budget.factors == pytest.approx([0.5, 1.0, 2.0, 4.0]) and budget.drawn == pytest.approx([8.0])
    assert survey.expected_divergence == pytest.approx(0.16)


@pytest.mark.parametrize(("ratio", "count"), [(1.09, 1), (1.11, 2), (0.92, 1), (0.9, 2)])
def test_a_tenth_more_or_less_is_near(ratio: float, count: int) -> None:
    _, budget = _search([0.02, 0.02], [0.01 * ratio, 0.01 * ratio])
    assert len(budget.factors) == count


def test_a_budget_in_bytes_is_spent_once() -> None:
    survey, budget = _search([0.02], [0.02], target_bytes=1000)
    assert budget.factors == [0.5] and budget.drawn == pytest.approx([1.0])
    assert survey.expected_divergence == pytest.approx(0.02)


@pytest.mark.parametrize("tried", [0.0, math.inf, math.nan])
def test_a_trial_without_a_number_changes_nothing(tried: float) -> None:
    survey, budget = _search([0.02], [tried])
    assert budget.factors == budget.drawn == [0.5]
    assert survey.expected_divergence == pytest.approx(0.01)


def test_where_nothing_is_lost_nothing_is_tried() -> None:
    survey, budget = _search([0.0], [1.0])
    assert budget.factors == [0.5] and not budget.drawn and survey.curve == ()


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 1 / 3), ({"method": "em"}, 1.0), ({"asymmetric_step": 0.0}, 1.0)]
)
def test_a_fit_that_aims_at_the_float_outputs_makes_most_errors_good(fields: dict[str, Any], expected: float) -> None:
    model = PlainNet().eval()
    budget: Any = SimpleNamespace(survey=surveyed(front_end(model), bgd.BGDConfig(**fields), original=model))
    assert energy_left(budget) == pytest.approx(expected)


def _energy(law: Any, measured: float, expected: float = 0.01, energy: float = 0.5) -> tuple[float, list[float]]:
    """The energy that is found where trials follow a law, and the energies tried."""
    tried: list[float] = []

    def joint(_: Any, trial: float) -> float:
        tried.append(trial)
        return float(law(trial))

    measurements: Any = SimpleNamespace(joint=joint)
    survey: Any = SimpleNamespace(expected_divergence=expected)
    return realized_energy(measurements, survey, energy, measured), tried


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_a_law_of_the_energy_is_followed_within_four_trials(power: float) -> None:
    found, tried = _energy(lambda energy: 0.01 * (energy / 0.5) ** power, 0.03)
    assert 0.01 * (found / 0.5) ** power == pytest.approx(0.03, rel=0.1)
    assert len(tried) <= 4 and found in tried
    assert tried[0] == pytest.approx(0.5 * 3)  # first as if in proportion
    if power != 1.0:
        assert tried[1] == pytest.approx(0.5 * 3 ** (1 / power), rel=0.01)


def test_what_is_near_enough_is_not_tried() -> None:
    assert _energy(lambda _: 1.0, 0.0109) == (0.5, [])
    assert _energy(lambda _: 1.0, 0.0092) == (0.5, [])
    assert len(_energy(lambda energy: 0.02 * energy, 0.0111)[1]) > 0


def test_one_pass_corrects_the_energy_by_a_factor_of_32_at_most() -> None:
    for divergence, found in ((1e3, 0.5 * 32), (1e-9, 0.5 / 32)):
        energy, tried = _energy(lambda energy: 0.02 * energy, divergence)
        assert energy == pytest.approx(found) and tried == [pytest.approx(found)]


def test_a_steep_or_flat_stretch_is_not_followed_too_far() -> None:
    _, tried = _energy(lambda energy: 0.01 * (energy / 0.5) ** 0.01, 0.02)
    assert tried[1] == pytest.approx(min(16.0, tried[0] * math.exp(math.log(0.02 / (0.01 * 2**0.01)) / 0.3)), rel=0.02)
    _, tried = _energy(lambda energy: 0.01 * (energy / 0.5) ** 40, 0.02)
    assert tried[1] == pytest.approx(tried[0] * math.exp(-math.log(2**40 / 2) / 10), rel=0.02) or tried[1] == 0.5 / 32


@pytest.mark.parametrize("result", [0.0, math.inf, math.nan])
def test_a_trial_that_gives_no_number_ends_the_search(result: float) -> None:
    found, tried = _energy(lambda _: result, 0.08)
    assert found == pytest.approx(0.5) and len(tried) == 1


def test_of_four_trials_the_nearest_is_taken() -> None:
    results = iter([0.05, 0.001, 0.025, 0.3])
    found, tried = _energy(lambda _: next(results), 0.02)
    assert len(tried) == 4 and found == tried[2]


def test_the_energy_of_the_next_choice_lies_between_those_that_passes_have_shown() -> None:
    """In logarithms, whatever the order of the passes; beyond both passes the nearer one's."""
    shown = [(0.001, 0.01), (0.1, 0.16)]
    for pairs in (shown, shown[::-1], [*shown, (0.5, 7.0)]):
        assert energy_at(pairs, 0.01) == pytest.approx(0.04)
        assert energy_at(pairs, 0.001) == 0.01
    assert energy_at(shown, 0.0001) == 0.01
    assert energy_at(shown, 0.3) == 0.16
    assert energy_at([(0.02, 0.3)], 0.01) == 0.3
    assert energy_at([(0.01, 0.2), (0.01, 0.4)], 0.01) in (0.2, 0.4)


def test_where_passes_have_missed_again_and_again_more_is_expected_to_be_left() -> None:
    shown = [(0.04, 0.2), (0.02, 0.3), (0.03, 0.4), (0.05, 0.1)]
    found = [energy_at(shown[:count], 0.01) for count in (1, 2, 3, 4)]
    assert found == pytest.approx([0.2, 0.3, 2 * 0.3, 4 * 0.3])
    assert math.isfinite(energy_at([(math.inf, 0.25)] * 5, 0.01))  # answers that are no numbers
    assert energy_at([*shown, (0.005, 0.35)], 0.01) < 0.35  # once one has come out below, it lies between two
    assert energy_at([(0.0, 0.2)], 0.01) == 0.2
