"""Moments add up over parts, weights and layers that share inputs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from bgd_plugin.pq import gram
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


@pytest.mark.parametrize("weighted", [False, True])
def test_several_processes_have_the_moments_of_all_positions(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    """Each with positions around a mean of its own, one with none; threads stand for processes."""
    generator = torch.Generator().manual_seed(8)
    inputs, outputs = (torch.randn(2, 90, n, generator=generator, dtype=torch.float64) for n in (6, 4))
    inputs[:, 50:] += 100
    outputs[:, 50:] -= 30
    times = torch.randint(1, 4, (90,), generator=generator).double()
    barrier, given = threading.Barrier(3), dict[int, Any]()

    def summed(value: Any) -> Any:
        given[threading.get_ident()] = value
        barrier.wait()
        parts = list(given.values())
        found = sum(parts) if isinstance(value, float) else [sum(part) for part in zip(*parts, strict=True)]
        barrier.wait()
        return found

    def sum_(tensors: Any) -> None:
        for tensor, found in zip(tensors, summed([t.clone() for t in tensors]), strict=True):
            tensor.copy_(found)

    monkeypatch.setattr(gram, "total", lambda value: summed(float(value)))
    monkeypatch.setattr(gram, "sum_", sum_)
    found: list[Moments] = []

    def process(places: slice) -> None:
        sums = MomentSums()
        for start in range(places.start, places.stop, 20):
            piece = slice(start, min(start + 20, places.stop))
            sums.add_(inputs[:, piece], outputs[:, piece], times[piece] if weighted else None)
        sums.add_(inputs[:, :0], outputs[:, :0], times[:0] if weighted else None)
        sums.share_()
        found.append(sums.means_())

    threads = [threading.Thread(target=process, args=(slice(*ends),)) for ends in ((0, 50), (50, 90), (0, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repeats = times.long() if weighted else torch.ones(90, dtype=torch.long)
    alone = Moments.of(inputs.repeat_interleave(repeats, 1), outputs.repeat_interleave(repeats, 1))
    assert len(found) == 3
    for one in found:
        for name in NAMES:
            torch.testing.assert_close(getattr(one, name), getattr(alone, name))


def test_joined_sums_leave_their_parts_as_they_were() -> None:
    generator = torch.Generator().manual_seed(9)
    inputs, outputs = (torch.randn(1, 80, n, generator=generator) + 3 for n in (6, 4))
    first, last = MomentSums(), MomentSums()
    first.add_(inputs[:, :30], outputs[:, :30])
    last.add_(inputs[:, 30:], outputs[:, 30:])
    joined = first.joined(last).means_()
    for found, places in ((joined, slice(0, 80)), (first.means_(), slice(0, 30)), (last.means_(), slice(30, 80))):
        for name in NAMES:
            wanted = getattr(Moments.of(inputs[:, places], outputs[:, places]), name)
            torch.testing.assert_close(getattr(found, name), wanted, rtol=1e-4, atol=1e-5)
