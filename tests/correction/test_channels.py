"""Moments and lines, channel by channel, against the literal ones of all values at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bgd_plugin.correction import channels
from bgd_plugin.correction.channels import ChannelMoments, LineFit
from bgd_plugin.errors import CalibrationError


@pytest.mark.parametrize("places", [(), (2,), (5, 7), (3, 3, 3)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_are_those_of_all_values(places: tuple[int, ...], offset: float) -> None:
    """Over few positions and many, and around a mean a thousand times as large as the spread."""
    parts = [
        torch.randn(size, 3, *places) * torch.tensor([1.0, 2.0, 0.5]).view(3, *(1 for _ in places))
        + offset * (torch.arange(3.0).view(3, *(1 for _ in places)))
        for size in (1, 4, 6)
    ]
    moments = ChannelMoments("norm")
    for part in parts:
        moments.add_(part)
    literal = torch.cat(parts).double().transpose(0, 1).flatten(1)
    for _ in range(2):  # asking changes nothing
        mean, variance = moments.means()
        torch.testing.assert_close(mean, literal.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance, literal.var(1, correction=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("places", "is_careful"), [((15,), True), ((3, 5), True), ((16,), False), ((4, 5), False)])
def test_few_positions_are_summed_around_their_mean(
    places: tuple[int, ...], is_careful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 16 of them, a sum of each sample's would cost more than a copy."""
    asked: list[Tensor] = []
    real = channels._careful_sums
    monkeypatch.setattr(channels, "_careful_sums", lambda value: asked.append(value) or real(value))
    ChannelMoments("norm").add_(torch.randn(4, 3, *places))
    assert bool(asked) == is_careful


@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (2, 3, 30, 30), (3, 40, 4, 4, 4)])
@pytest.mark.parametrize("is_last", [False, True])
def test_sums_are_those_of_each_channel_wherever_channels_lie(shape: tuple[int, ...], is_last: bool) -> None:
    value = torch.randn(shape) + 0.3
    if is_last:
        value = value.movedim(1, -1).contiguous().movedim(-1, 1)
    total, square = channels.channel_sums(value)
    literal = value.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(total, literal.sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(square, literal.square().sum(1), rtol=1e-5, atol=0)


def test_constant_channels_have_no_variance() -> None:
    """Whatever rounding leaves of a difference of sums, it is not below zero."""
    moments, values = ChannelMoments("norm"), 1e3 * torch.rand(300, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        moments.add_(values[None, :, None].expand(7, 300, 5))
    mean, variance = moments.means()
    torch.testing.assert_close(mean, values.double(), rtol=1e-6, atol=0)
    assert bool((variance >= 0).all()) and float((variance / mean.square()).max()) < 1e-9


def test_sums_of_other_processes_are_added_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process with the same values changes nothing, however often one asks."""

    def twice_(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2

    moments, fit = ChannelMoments("norm"), LineFit()
    moments.add_(torch.randn(9, 3))
    fit.add_(torch.randn(3, 9), torch.randn(3, 9))
    alone = [*moments.means(), *fit.solved()]
    monkeypatch.setattr(channels, "sum_", twice_)
    monkeypatch.setattr(channels, "sum_of", lambda number: 2 * float(number))
    for _ in range(2):
        for one, other in zip([*moments.means(), *fit.solved()], alone, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_name_the_norm(bad: float) -> None:
    moments = ChannelMoments("body.norm")
    moments.add_(torch.tensor([[1.0, bad]]))
    with pytest.raises(CalibrationError, match=r"batch norm 'body\.norm': its inputs"):
        moments.means()


def test_a_line_is_the_least_squares_one() -> None:
    """In three batches of other sizes; a channel that does not vary gets a slope that is a number."""
    z = [torch.randn(4, n) for n in (3, 10, 6)]
    t = [torch.tensor([2.0, -1.0, 0.5, 1.0])[:, None] * x + torch.randn(4, 1) + 0.1 * torch.randn(x.shape) for x in z]
    for x in z:
        x[3] = 0.0
    fit = LineFit()
    for one, other in zip(z, t, strict=True):
        fit.add_(one, other)
    x, y = torch.cat(z, 1).double(), torch.cat(t, 1).double()
    for _ in range(2):
        slope, z_mean, t_mean = fit.solved()
        torch.testing.assert_close(z_mean, x.mean(1))
        torch.testing.assert_close(t_mean, y.mean(1))
        for channel in range(3):
            design = torch.stack([x[channel], torch.ones_like(x[channel])], 1)
            expected = torch.linalg.lstsq(design, y[channel][:, None]).solution[0, 0]
            torch.testing.assert_close(slope[channel], expected)
        assert bool(torch.isfinite(slope).all())


def test_a_line_is_found_around_a_large_mean() -> None:
    """Where sums in single precision would have no digit left of the spread."""
    z = (5000 + torch.randn(2, 4000)).float()
    t = (3 * (z - 5000) + 7000).float()
    fit = LineFit()
    for one, other in zip(z.split(500, 1), t.split(500, 1), strict=True):
        fit.add_(one, other)
    slope, z_mean, t_mean = fit.solved()
    assert slope.dtype == torch.float64
    torch.testing.assert_close(slope, torch.full((2,), 3.0, dtype=torch.float64), rtol=2e-3, atol=0)
    torch.testing.assert_close(3 * (z_mean - 5000) + 7000, t_mean, rtol=1e-5, atol=0)
