"""How a budget spends what sensitivities say: on made-up losses, without a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import trace
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.candidates import Sensitivity, block_sizes
from bgd_plugin.planning.losses import LEVEL, joint_loss
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.pq.rate import RateCurve


def _made_up(**fields: Any) -> tuple[Budget, dict[str, Sensitivity]]:
    """A budget of two layers, the same each time, and losses for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    budget = Budget.of(surveyed(trace(model.eval()), BGDConfig(**fields), original=model))
    assert budget is not None
    blocks = block_sizes((64, 64))
    curves = tuple(RateCurve(block_size=d, points=((16, 1.0 / d), (256, 0.1 / d))) for d in blocks)
    losses = {"2": 0.3, "4": 0.1}
    return budget, {
        name: Sensitivity(curves=curves, losses=((1.0, loss),), reason="made up") for name, loss in losses.items()
    }


def test_a_curve_is_corrected_by_what_an_earlier_pass_has_shown() -> None:
    budget, sensitivities = _made_up(max_divergence=0.05)
    plain, corrected = (budget.curve(sensitivities, realized) for realized in (1.0, 3.0))
    assert [p.file_bytes for p in plain] == [p.file_bytes for p in corrected]
    assert [p.expected_divergence for p in corrected] == pytest.approx([3 * p.expected_divergence for p in plain])
    assert plain[0].expected_divergence > 0


def test_a_bound_is_spent_as_an_earlier_pass_has_shown() -> None:
    """Three times the loss for the same sizes is the same as a third of the bound."""
    sizes = []
    for bound, realized in ((0.06, 3.0), (0.02, 1.0)):
        budget, sensitivities = _made_up(max_divergence=bound)
        survey = budget.spend(sensitivities, realized)
        sizes.append([(p.name, p.block_size, p.codebook_size) for p in survey.layers])
        assert survey.expected_divergence is not None and survey.expected_divergence <= bound
    assert sizes[0] == sizes[1]


def test_what_was_spent_is_said_in_bytes_and_in_percent() -> None:
    budget, sensitivities = _made_up(target_bytes=9000, max_divergence=None)
    survey = budget.spend(sensitivities)
    size = budget.sketch.file_size(survey.chosen)
    (note,) = survey.notes
    assert note.startswith(f"budget: {size:,} of 9,000 bytes ({size / 9000:.2%})")


def test_a_layer_that_could_not_be_measured_counts_as_the_middle_one() -> None:
    budget, sensitivities = _made_up(max_divergence=0.05)
    del sensitivities["4"]
    known = budget._known(sensitivities)
    assert known["2"] == sensitivities["2"] and known["4"].per_error() == pytest.approx(0.3)
    more = {n: replace(known["2"], losses=((1.0, loss),)) for n, loss in (("one", 0.1), ("two", 5.0))}
    assert budget._known({**sensitivities, **more})["4"].per_error() == pytest.approx(0.3)
    other = _made_up(max_divergence=0.05, seed=1)[0]._known(sensitivities)
    assert other["4"].curves != known["4"].curves and "own error" in known["4"].reason


def test_a_bound_is_aimed_at_with_a_fifth_to_spare() -> None:
    """What comes out differs a little from what is expected; the finest choice below that is taken."""
    shares = []
    for bound in (0.01, 0.02, 0.03, 0.05, 0.08):
        budget, sensitivities = _made_up(max_divergence=bound)
        found = budget.spend(sensitivities).expected_divergence
        assert found is not None
        shares.append(found / bound)
    assert 0.7 < max(shares) <= 0.8 * 1.001


def test_a_bound_whose_losses_an_earlier_pass_has_corrected_is_reported_in_the_corrected_ones() -> None:
    budget, sensitivities = _made_up(max_divergence=0.05)
    survey = budget.spend(sensitivities, 2.0)
    errors = [
        (sensitivities[layer.name], sensitivities[layer.name].error(layer.block_size, layer.codebook_size))
        for layer in survey.layers
    ]
    assert survey.expected_divergence == pytest.approx(2.0 * joint_loss(errors), rel=0.01)
    assert f"expected {survey.expected_divergence:.3g}" in survey.notes[-1]


def _fixed(**fields: Any) -> Budget | None:
    """The budget of a network all of whose sizes are set."""
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    overrides = (("2", LayerConfig(block_size=4, codebook_size=16)),)
    return Budget.of(surveyed(trace(model), BGDConfig(overrides=overrides, **fields), original=model))


def test_where_all_sizes_are_set_only_a_target_is_a_budget() -> None:
    """A bound has nothing to choose; a file that is too long is an error all the same."""
    assert _fixed(max_divergence=0.01) is None
    assert _fixed(target_bytes=100_000) is not None
    with pytest.raises(ConfigError, match="the least possible size is"):
        _fixed(target_bytes=100)


@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_bound_that_only_float_meets_has_the_layer_quantized_that_bears_it_best(is_fixed: bool) -> None:
    """So small a bound that every free layer would be float: nothing would be quantized, where no other layer is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    overrides = (("4", LayerConfig(block_size=4, codebook_size=16)),) if is_fixed else ()
    config = BGDConfig(max_divergence=1e-9, overrides=overrides)
    budget = Budget.of(surveyed(trace(model), config, original=model))
    assert budget is not None
    curves = tuple(RateCurve(block_size=d, points=((16, 1.0), (256, 0.5))) for d in block_sizes((64, 64)))
    losses = {"2": 2.0, "4": 1.0}
    known = {f.name: Sensitivity(curves=curves, losses=((1.0, losses[f.name]),), reason="made up") for f in budget.free}
    survey = budget.spend(known)
    assert [(x.name, x.codebook_size) for x in survey.layers] == [("4", 16 if is_fixed else 256)]
    assert any("only the layer that bears codes best" in note for note in survey.notes) == (not is_fixed)


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of all layers together at which options are rated, one after the other."""
    asked: list[float] = []
    rated = Budget.rated

    def watched(self: Budget, known: Any, level: float = LEVEL) -> Any:
        asked.append(level)
        return rated(self, known, level)

    monkeypatch.setattr(Budget, "rated", watched)
    return asked


def test_shares_are_told_at_the_loss_that_the_file_comes_to(levels: list[float]) -> None:
    """A layer whose loss grows faster than its error weighs more the more is lost: the choice is made once more."""
    budget, sensitivities = _made_up(target_bytes=9000, max_divergence=None)
    survey = budget.spend(sensitivities)
    assert levels[0] == LEVEL and len(levels) == 2
    assert levels[1] == pytest.approx(survey.expected_divergence, rel=0.5) and levels[1] != LEVEL


@pytest.mark.parametrize("realized", [1.0, 2.0])
def test_shares_within_a_bound_are_told_at_the_loss_that_is_aimed_at(realized: float, levels: list[float]) -> None:
    budget, sensitivities = _made_up(max_divergence=0.03)
    budget.spend(sensitivities, realized)
    assert levels == [pytest.approx(0.8 * 0.03 / realized)]


def test_the_curve_is_computed_once_for_all_factors(levels: list[float]) -> None:
    """Correcting what is expected changes the curve by a factor alone; other measurements make another curve."""
    budget, sensitivities = _made_up()
    once = budget.curve(sensitivities)
    asked = len(levels)
    twice = budget.curve(sensitivities, 3.0)
    assert len(levels) == asked
    assert [point.file_bytes for point in twice] == [point.file_bytes for point in once]
    assert [p.expected_divergence for p in twice] == [3 * p.expected_divergence for p in once]
    halved = {
        name: replace(one, losses=tuple((error, loss / 2) for error, loss in one.losses))
        for name, one in sensitivities.items()
    }
    other = budget.curve(halved)
    assert len(levels) > asked
    assert other[0].expected_divergence < once[0].expected_divergence
    assert budget.curve(halved) == replace(budget, _worthwhile={}, _curves=[]).curve(halved)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_divergence": 1e-4}, "codes would add too much error for the bytes they save"),
        ({"target_bytes": 12_000, "max_divergence": None}, "the budget has room for it in float"),
    ],
)
def test_why_a_layer_stays_float_is_said_of_bounds_and_budgets(fields: dict[str, Any], reason: str) -> None:
    budget, sensitivities = _made_up(**fields)
    survey = budget.spend({**sensitivities, "2": replace(sensitivities["2"], losses=((1.0, 300.0),))})
    assert [p.name for p in survey.layers] == ["4"]
    assert [s.reason for s in survey.skipped if s.name == "2"] == [reason]
