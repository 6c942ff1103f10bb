"""Moments add up over parts, weights and layers that share inputs."""

from __future__ import annotations

import pytest
import torch

from bgd_plugin.pq.gram import Moments, MomentSums
from tests.pq.test_target_asymmetric import drifted_layer

NAMES = ("covariance", "mean", "cross", "output_mean")


def test_moments_of_parts_add_up() -> None:
    inputs, _, outputs = drifted_layer(2)
    whole = Moments.of(inputs, outputs)
    places = [slice(start, start + 100) for start in range(0, 400, 100)]
    parts = [Moments.of(inputs[:, place], outputs[:, place]) for place in places]
    first, second = (Moments.pooled(*parts[start : start + 2], 0.5) for start in (0, 2))
    pooled = Moments.pooled(first, second, 0.5)
    literal = torch.cat([inputs, outputs], 2) - torch.cat([inputs, outputs], 2).mean(1, keepdim=True)
    second_moments = literal.mT @ literal / 400
    columns = inputs.shape[2]
    for found in (whole, pooled):
        torch.testing.assert_close(found.covariance, second_moments[:, :columns, :columns])
        torch.testing.assert_close(found.cross, second_moments[:, :columns, columns:])
        torch.testing.assert_close(found.mean, inputs.mean(1))
        torch.testing.assert_close(found.output_mean, outputs.mean(1))
    around_zero = inputs.mT @ inputs / 400, inputs.mT @ outputs / 400
    for mine, theirs in zip(whole.around_zero(), around_zero, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_moments_of_inputs_give_those_of_any_layer_that_reads_them() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, others = (torch.randn(2, 50, 6, generator=generator) + 1 for _ in range(2))
    weight = torch.randn(8, 6, generator=generator)
    outputs = others @ weight.reshape(2, 4, 6).mT
    shared = Moments.of(inputs, others)
    through, direct = shared.through(weight), Moments.of(inputs, outputs)
    for name in NAMES:
        torch.testing.assert_close(getattr(through, name), getattr(direct, name), rtol=1e-5, atol=1e-6)
    for one, other in zip(through.around_zero(), direct.around_zero(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(shared.covariance, direct.covariance)  # which all layers share, and none may change


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
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(repeated, name), rtol=1e-5, atol=1e-5)


def test_a_huge_position_of_little_weight_leaves_the_digits_of_the_others() -> None:
    generator = torch.Generator().manual_seed(6)
    inputs, outputs = (torch.randn(1, 4000, n, generator=generator) for n in (6, 4))
    inputs[:, 0] *= 1e5
    weights = torch.ones(4000)
    weights[0] = 1e-10
    sums = MomentSums()
    sums.add_(inputs, outputs, weights)
    gram, _ = sums.means_().around_zero()
    literal = (inputs[0].double() * weights.double()[:, None]).T @ inputs[0].double() / weights.double().sum()
    torch.testing.assert_close(gram[0].double(), literal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_that_wait_are_summed_as_they_were(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    inputs, outputs = (torch.randn(2, 400, n, generator=generator) + 1 for n in (40, 30))
    times = torch.randint(1, 4, (400,), generator=generator).float() if weighted else None
    sums, one = MomentSums(), MomentSums()
    one.add_(inputs, outputs, times)
    for start in (*range(0, 400, 3), 400):
        end = min(start + 3, 400)
        x, y = inputs[:, start:end].clone(), outputs[:, start:end].clone()
        sums.add_(x, y, None if times is None else times[start:end])
        for piece in (x, y):
            piece.fill_(float("nan"))  # as memory is that is used again
    assert sums.count == one.count == (400 if times is None else float(times.sum()))
    found, all_at_once = sums.means_(), one.means_()
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(all_at_once, name), rtol=1e-5, atol=1e-5)
