"""What a layer with trellis codes is expected to lose, before it is fitted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bgd_plugin import kernels
from bgd_plugin.fitting.trellis_windows import fit_windows
from bgd_plugin.planning.window_error import window_error
from bgd_plugin.pq.windows import decode_windows


def _gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _fitted_error(weight: Tensor) -> float:
    """The mean square of the error of a fit of the whole weight `[rows, columns]`."""
    fit = fit_windows(weight, None)
    return float((weight - decode_windows(fit.codebook, fit.codes)).square().mean())


@pytest.mark.parametrize("shape", [(64, 96), (250, 40), (2100, 24)])
def test_it_is_that_of_a_fit(shape: tuple[int, int]) -> None:
    weight = _gaussian(*shape) * torch.linspace(0.2, 3, shape[0])[:, None]
    found = window_error(weight[None], torch.ones(1, shape[1]))
    assert found == pytest.approx(_fitted_error(weight), rel=0.06)


def test_normal_weights_lose_seven_hundredths_and_heavy_tails_more() -> None:
    weight = _gaussian(512, 64)
    assert window_error(weight[None], torch.ones(1, 64)) == pytest.approx(0.0705, abs=0.002)
    heavy = weight.sign() * weight.abs() ** 2
    found = window_error(heavy[None], torch.ones(1, 64))
    assert found is not None and found / float(heavy.square().mean()) > 0.085


def test_columns_count_by_their_metric_also_those_that_are_not_searched() -> None:
    weight, metrics = _gaussian(512, 64), torch.ones(1, 64)
    plain = window_error(weight[None], metrics)
    metrics[0, ::2] = 9  # 8 of 64 columns are searched, all of them even
    assert plain is not None
    assert window_error(weight[None], metrics) == pytest.approx(5 * plain, rel=1e-4)


def test_groups_are_rows_of_one_ring() -> None:
    weight = _gaussian(4, 16, 60)
    found = window_error(weight, torch.ones(4, 60))
    assert found == pytest.approx(_fitted_error(weight.flatten(0, 1)), rel=0.06)
    metrics = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].expand(4, 60)
    part = window_error(weight, metrics)
    assert part is not None and found is not None and 0.6 * found < part < 0.8 * found


def test_too_few_rows_have_none_and_zeros_lose_nothing() -> None:
    assert window_error(_gaussian(1, 15, 8), torch.ones(1, 8)) is None
    assert window_error(torch.zeros(1, 16, 8), torch.ones(1, 8)) == 0.0
    some = _gaussian(16, 8)
    some[3] = 0
    found = window_error(some[None], torch.ones(1, 8))
    assert found is not None and math.isfinite(found)


def test_the_plain_search_gives_the_same_number() -> None:
    weight, metrics = _gaussian(1, 40, 12), torch.rand(1, 12) + 0.1
    found = window_error(weight, metrics)
    with kernels.disabled():
        assert window_error(weight, metrics) == found
