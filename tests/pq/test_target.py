"""The asymmetric target against ridge regression on explicit rows, and that it does what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.target import Moments, MomentSums, asymmetric_target, matching_bias


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
    target = asymmetric_target(weight, Moments.of(inputs, outputs), step=1.0, damping=0.05).reshape(groups, 7, 12)
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
    whole, half = (asymmetric_target(weight, moments, step=step) for step in (1.0, 0.5))
    torch.testing.assert_close(half, (weight + whole) / 2)
    assert torch.equal(asymmetric_target(weight, moments, step=0.0), weight)


def test_it_brings_the_outputs_nearer_on_unseen_positions() -> None:
    inputs, weight, outputs = drifted_layer(positions=1200)
    moments = Moments.of(inputs[:, :600], outputs[:, :600])

    def error(candidate: Tensor) -> float:
        bias = matching_bias(candidate, moments.mean, moments.output_mean)
        return float((inputs[:, 600:] @ candidate.T + bias - outputs[:, 600:]).square().sum())

    half, whole = (asymmetric_target(weight, moments, step=step) for step in (0.5, 1.0))
    assert error(whole) < error(half) < 0.6 * error(weight)


def test_without_drift_it_is_the_weight() -> None:
    inputs, weight, _ = drifted_layer()
    outputs = inputs @ weight.T + 5
    torch.testing.assert_close(asymmetric_target(weight, Moments.of(inputs, outputs), step=1.0), weight)


def test_moments_of_parts_add_up() -> None:
    inputs, _, outputs = drifted_layer(2)
    whole = Moments.of(inputs, outputs)
    places = [slice(start, start + 100) for start in range(0, 400, 100)]
    parts = [Moments.of(inputs[:, place], outputs[:, place]) for place in places]
    for name in ("gram", "mean", "cross", "output_mean"):
        torch.testing.assert_close(torch.stack([getattr(part, name) for part in parts]).mean(0), getattr(whole, name))


def test_the_bias_matches_the_means() -> None:
    inputs, weight, outputs = drifted_layer(2)
    moments = Moments.of(inputs, outputs)
    bias = matching_bias(weight, moments.mean, moments.output_mean).reshape(2, 1, 7)
    produced = inputs @ weight.reshape(2, 7, 12).mT + bias
    torch.testing.assert_close(produced.mean(1), outputs.mean(1))


def test_dead_inputs_keep_the_weight_and_its_dtype() -> None:
    _, weight, outputs = drifted_layer()
    target = asymmetric_target(weight.float(), Moments.of(torch.zeros(1, 400, 12).double(), outputs))
    assert torch.equal(target, weight.float())
    assert target.dtype == torch.float32
    with pytest.raises(ValueError, match="damping above 0"):
        asymmetric_target(weight, Moments.of(torch.zeros(1, 400, 12).double(), outputs), damping=0.0)


def test_moments_of_inputs_give_those_of_any_layer_that_reads_them() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, others = (torch.randn(2, 50, 6, generator=generator) + 1 for _ in range(2))
    weight = torch.randn(8, 6, generator=generator)
    outputs = others @ weight.reshape(2, 4, 6).mT
    shared = Moments.of(inputs, others)
    through, direct = shared.through(weight), Moments.of(inputs, outputs)
    for name in ("gram", "mean", "cross", "output_mean"):
        torch.testing.assert_close(getattr(through, name), getattr(direct, name), rtol=1e-5, atol=1e-6)
    through.centred_()
    torch.testing.assert_close(shared.gram, direct.gram)  # one layer's fit uses its own copy up


@pytest.mark.parametrize("groups", [1, 3])
def test_weighted_moments_are_those_of_repeated_positions(groups: int) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = 3 + torch.randn(groups, 30, 6, generator=generator)
    outputs = torch.randn(groups, 30, 4, generator=generator) - 5
    times = torch.randint(0, 4, (30,), generator=generator)
    sums = MomentSums()
    sums.add_(inputs[:, :11], outputs[:, :11], times[:11].float())
    sums.add_(inputs[:, 11:], outputs[:, 11:], times[11:].float())
    sums.add_(inputs[:, :0], outputs[:, :0], times[:0].float())
    found = sums.means_()
    repeated = Moments.of(inputs.repeat_interleave(times, 1), outputs.repeat_interleave(times, 1))
    for name in ("gram", "mean", "cross", "output_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(repeated, name), rtol=1e-5, atol=1e-5)


def test_a_huge_position_of_little_weight_leaves_the_digits_of_the_others() -> None:
    generator = torch.Generator().manual_seed(6)
    inputs, outputs = (torch.randn(1, 4000, n, generator=generator) for n in (6, 4))
    inputs[:, 0] *= 1e5
    weights = torch.ones(4000)
    weights[0] = 1e-10
    sums = MomentSums()
    sums.add_(inputs, outputs, weights)
    gram = sums.means_().gram
    literal = (inputs[0].double() * weights.double()[:, None]).T @ inputs[0].double() / weights.double().sum()
    torch.testing.assert_close(gram[0], literal, rtol=1e-4, atol=1e-4)
