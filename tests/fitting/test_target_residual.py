"""Positions count by the size of the sum they end in; a channel without gain is asked for nothing."""

from __future__ import annotations

import pytest
import torch

from bgd_plugin.fitting import target_residual


def test_positions_count_by_the_size_of_their_sum() -> None:
    stream = torch.randn(11, 4)
    stream[3] *= 1000
    energy = stream.double().square().mean(1)
    expected = torch.stack([1 / (e + sorted(energy)[5]) for e in energy])
    expected = expected / expected.sum() * 11
    torch.testing.assert_close(target_residual.relative_weights(stream), expected.float())
    torch.testing.assert_close(target_residual.relative_weights(torch.ones(5, 3)), torch.ones(5))


@pytest.mark.parametrize("filled", [0, 1, 3])
def test_empty_positions_have_finite_weights(filled: int) -> None:
    stream = torch.zeros(10, 4)
    stream[:filled] = 1e15
    weights = target_residual.relative_weights(stream)
    assert torch.isfinite(weights).all()
    assert float(weights.mean()) == pytest.approx(1)


def test_channels_without_gain_are_not_asked_for_anything() -> None:
    gain = torch.tensor([2.0, -1.0, 0.0, 1e-4])
    floor = 0.01 * gain.square().mean()
    torch.testing.assert_close(target_residual._inverse(gain), gain / (gain.square() + floor))
    assert torch.equal(target_residual._inverse(torch.zeros(3)), torch.zeros(3))
