"""The fit of trellis windows: scales, error feedback, damping, zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin.fitting import method_full_gram, trellis_windows
from bgd_plugin.fitting.trellis_windows import fit_windows
from bgd_plugin.pq.feedback import damped
from tests.networks import PlainNet, randomized, vectors

pytestmark = pytest.mark.usefixtures("compiled_search")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gram(columns: int, groups: int = 1, seed: int = 1) -> Tensor:
    """Of inputs that depend on each other, and of very different sizes."""
    inputs = _random(groups, 4 * columns, columns, seed=seed) @ _random(groups, columns, columns, seed=seed + 1)
    inputs *= torch.logspace(-1, 1, columns)
    return inputs.mT @ inputs / inputs.shape[1]


def _loss(weight: Tensor, decoded: Tensor, gram: Tensor) -> float:
    away = (weight - decoded).reshape(len(gram), -1, weight.shape[1])
    return float(((away @ gram) * away).sum())


def test_error_feedback_lowers_the_error_of_the_outputs() -> None:
    weight, gram = _random(32, 24), _gram(24)
    fed, blind = (fit_windows(weight, g).decoded(weight.shape) for g in (gram, None))
    assert _loss(weight, fed, gram) < 0.6 * _loss(weight, blind, gram)
    assert float((weight - blind).square().mean()) < 0.1  # of a variance of 1, at two bits


def test_columns_with_large_inputs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = _random(32, 24), _gram(24)
    best = _loss(weight, fit_windows(weight, gram).decoded(weight.shape), gram)
    real = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda x, **_: real(x, descending=False, stable=True))
    worst = _loss(weight, fit_windows(weight, gram).decoded(weight.shape), gram)
    assert best < 0.9 * worst


def test_scales_are_the_best_ones_and_in_half_precision() -> None:
    """Under the damped Gram, in which rows are fitted: half precision is 1 part in 2,000 off at most."""
    weight, gram = _random(20, 12) * torch.logspace(-3, 3, 20)[:, None], _gram(12)
    fit = fit_windows(weight, gram)
    assert torch.equal(fit.codebook.half().float(), fit.codebook)
    decoded, hessian = fit.decoded(weight.shape), damped(gram, trellis_windows._DAMPING)[0].float()
    best = ((weight @ hessian) * decoded).sum(1) / ((decoded @ hessian) * decoded).sum(1)
    torch.testing.assert_close(best, torch.ones(20), rtol=0, atol=1e-3)


@pytest.mark.parametrize("unit", [1e-20, 1e-3, 1e18])
def test_the_unit_does_not_matter(unit: float) -> None:
    weight, gram = _random(20, 12), _gram(12)
    one, other = fit_windows(weight, gram), fit_windows(weight * 2.0**10, gram * 2.0**-30)
    assert torch.equal(one.codes, other.codes)
    for scale in (2.0**-100, 2.0**100):  # squares of them are beyond single precision
        assert torch.equal(fit_windows(weight, gram * scale).codes, one.codes)
    assert torch.isfinite(fit_windows(weight * unit, gram).codebook).all()


def test_rows_of_zeros_stay_zero_and_cost_nothing() -> None:
    weight = _random(20, 12)
    weight[3:6] = 0
    fit = fit_windows(weight, _gram(12))
    assert not fit.decoded(weight.shape)[3:6].any()
    assert torch.isfinite(fit.codebook).all()


def test_masked_weights_are_zero_and_their_error_is_carried_over() -> None:
    weight, gram = _random(32, 24), _gram(24)
    mask = _random(32, 24, seed=5) > -0.5
    fit = fit_windows(weight, gram, mask=mask)
    found = torch.where(mask, fit.decoded(weight.shape), 0.0)
    blind = torch.where(mask, fit_windows(weight, gram).decoded(weight.shape), 0.0)
    assert _loss(weight, found, gram) < 0.8 * _loss(weight, blind, gram)


def test_a_row_that_is_masked_everywhere_does_not_disturb_the_others() -> None:
    """Its aim is not zero where the layers before it have lost something."""
    weight, gram = _random(32, 24), _gram(24)
    mask = torch.ones(32, 24, dtype=torch.bool)
    mask[5] = False
    weight[5] = 0
    empty = fit_windows(weight, gram, mask=mask)
    weight[5] = 0.1 * _random(24)
    found = fit_windows(weight, gram, mask=mask)
    assert torch.equal(found.codes, empty.codes) and torch.equal(found.codebook, empty.codebook)


def test_what_masked_weights_aim_at_counts_for_nothing_without_feedback() -> None:
    weight, mask = _random(32, 24), _random(32, 24, seed=5) > -0.5
    empty, full = (fit_windows(torch.where(mask, weight, value), None, mask=mask) for value in (0.0, 3.0))
    assert torch.equal(empty.codes, full.codes) and torch.equal(empty.codebook, full.codebook)


def test_errors_of_a_row_count_by_the_square_of_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a column are one walk, whose values are in units of their rows' scales; what pads it counts not."""
    seen: list[tuple[Any, Any]] = []
    real = trellis_windows.nearest_ring

    def watched(search: Any, values: Any, weights: Any, table: Any) -> Any:
        seen.append((torch.from_numpy(values), torch.from_numpy(weights)))
        return real(search, values, weights, table)

    monkeypatch.setattr(trellis_windows, "nearest_ring", watched)
    weight = _random(21, 12) * torch.logspace(-1, 0, 21)[:, None]
    fit_windows(weight, None)
    power = weight.square().mean(1)
    assert len(seen) == 12
    for column, (values, weights) in enumerate(seen):
        torch.testing.assert_close(weights[:21], power / power.mean(), rtol=2e-3, atol=0)
        torch.testing.assert_close(values[:21], weight[:, column] / power.sqrt(), rtol=2e-3, atol=1e-5)
        assert not values[21:].any() and not weights[21:].any()


def test_groups_have_their_own_inputs() -> None:
    weight, grams = _random(32, 12), _gram(12, groups=2)
    found = fit_windows(weight, grams).decoded(weight.shape)
    swapped = fit_windows(weight, grams.flip(0)).decoded(weight.shape)
    assert _loss(weight, found, grams) < 0.8 * _loss(weight, swapped, grams)


def test_the_damping_is_chosen_on_inputs_kept_aside() -> None:
    """Where few inputs are fitted, feedback fits their noise unless it is damped."""
    weight = _random(48, 40)
    whole = _gram(40)
    root = torch.linalg.cholesky(whole[0].double() + 1e-6 * torch.eye(40))
    inputs = _random(24, 40, seed=9).double() @ root.T
    few = (inputs.T @ inputs / 24)[None].float()
    dampings = [trellis_windows._best_damping(weight, None, gram, whole) for gram in (few, whole)]
    assert dampings == [0.25, 0.03]


@pytest.mark.parametrize(
    ("rows", "groups", "tried"), [(200, 1, 50), (200, 2, 50), (96, 2, 48), (10, 1, 10), (60, 60, 60)]
)
def test_the_damping_is_tried_on_some_rows_of_each_group(
    rows: int, groups: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every so many rows, about 48 in all; with their own zeros."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = trellis_windows._Task.of

    def watched(weight: Tensor, gram: Tensor, mask: Tensor, dampings: Any) -> Any:
        seen.append((weight, mask))
        return real(weight, gram, mask, dampings)

    monkeypatch.setattr(trellis_windows._Task, "of", watched)
    weight, grams, mask = _random(rows, 6), _gram(6, groups), _random(rows, 6, seed=3) > 0
    trellis_windows._best_damping(weight, mask, grams, grams)
    step = rows // tried
    ((found, zeros),) = seen
    assert torch.equal(found, weight[::step]) and torch.equal(zeros, mask[::step])


def test_dampings_that_are_tried_together_are_those_tried_alone() -> None:
    """Each has its own Gram, feedback and scales; the search goes on from the rows of one to those of the next."""
    weight, grams, mask = _random(48, 12), _gram(12, groups=2), _random(48, 12, seed=3) > -1
    both = trellis_windows._Task.of(weight, grams, mask, [0.03, 0.5])
    states = both.encoded(is_ring=False)
    decoded, scale = both.decoded(states).view(2, 48, 12), both.solved_scale(states).view(2, 48)
    for i, damping in enumerate((0.03, 0.5)):
        alone = trellis_windows._Task.of(weight, grams, mask, [damping])
        own = alone.encoded(is_ring=False)
        expected = _loss(weight, alone.decoded(own) * alone.solved_scale(own)[:, None], grams)
        assert _loss(weight, decoded[i] * scale[i, :, None], grams) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_without_inputs_that_judge_the_damping_is_a_middle_one(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    real = trellis_windows._Task.of

    def watched(weight: Tensor, gram: Tensor, mask: Tensor, dampings: Any) -> Any:
        seen.append(list(dampings))
        return real(weight, gram, mask, dampings)

    monkeypatch.setattr(trellis_windows._Task, "of", watched)
    gram = _gram(24)
    fit_windows(_random(32, 24), gram, **dict(list({"fitted": gram, "heldout": gram}.items())[:parts]))
    assert seen == ([[0.08]] if parts < 2 else [[0.03, 0.25], [0.03]])


def test_what_is_chosen_reaches_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = _random(32, 24), _gram(24)
    plain = fit_windows(weight, gram, fitted=gram, heldout=gram)
    monkeypatch.setattr(trellis_windows, "_best_damping", lambda *_: 30.0)
    assert not torch.equal(fit_windows(weight, gram, fitted=gram, heldout=gram).codes, plain.codes)


@pytest.mark.parametrize("where", ["weight", "gram"])
def test_values_that_are_not_finite_are_refused(where: str) -> None:
    weight, gram = _random(16, 4), _gram(4)
    (weight if where == "weight" else gram[0])[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit_windows(weight, gram)


def test_the_method_gives_all_inputs_those_that_judge_and_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[dict[str, Any]]()
    real = method_full_gram.fit_windows

    def watched(weight: Tensor, gram: Tensor | None, **settings: Any) -> Any:
        seen.append({"weight": weight.clone(), "gram": gram, **settings})
        return real(weight, gram, **settings)

    monkeypatch.setattr(method_full_gram, "fit_windows", watched)
    model = randomized(PlainNet()).eval()
    with torch.no_grad():
        model[2].weight[model[2].weight.abs() < 0.05] = 0
    config = bgd.BGDConfig(
        linear=bgd.LayerConfig(codes="trellis"), max_divergence=None, preserve_zeros=True, kept_aside=0.0
    )
    result = bgd.quantize(model, vectors(batches=4), config, progress=False)
    (call,) = seen
    inputs = torch.relu(model[0](torch.cat(vectors(batches=4)))).detach()
    cut = 4 * len(inputs) // 5  # every fifth row, rounded up, judges
    parts = {"gram": inputs, "fitted": inputs[: cut + 1], "heldout": inputs[cut + 1 :]}
    for name, rows in parts.items():
        covariance = torch.cov(rows.T, correction=0)
        torch.testing.assert_close(call[name][0].float(), covariance, rtol=0, atol=2e-3)  # 8-bit weights in front
    assert torch.equal(call["mask"], model[2].weight != 0)
    layer = result.model[2]
    wanted = model[2](inputs).mean(0)
    torch.testing.assert_close(layer(inputs).mean(0), wanted, rtol=0, atol=5e-3)  # the bias makes good the means
