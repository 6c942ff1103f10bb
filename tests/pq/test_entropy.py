"""The fit to a number of bytes: never exceeded, nearly used up, and better than other codes of as many bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.stream import encoded
from bgd_plugin.pq.entropy import _next, fit_entropy
from bgd_plugin.pq.full_gram import fit_full
from bgd_plugin.pq.least_squares import output_objective


def _gram(columns: int, groups: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 4 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5)
    return (x.mT @ x / (4 * columns)).double()


def _weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bits", [1.0, 2.3, 4.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_bytes_are_used_and_never_exceeded(bits: float, groups: int) -> None:
    weight, gram = _weight(120, 60), _gram(60, groups)
    most = int(bits * weight.numel() / 8) + 150
    fit = fit_entropy(weight, gram, most, damping=0.1)
    stream = encoded([(fit.codes, len(fit.codebook))])[0].numel() + len(fit.codebook) + 4
    assert 0.97 * most < stream <= fit.size_bytes <= most
    assert int(fit.codes.min()) >= 0
    assert int(fit.codes.max()) < len(fit.codebook) <= 256


def test_more_bytes_lose_less_as_theory_has_it() -> None:
    weight = _weight(200, 100)
    errors = [
        float((weight - fit.codebook[fit.codes].squeeze(2)).square().mean())
        for most in (5000, 7500, 10_000)
        for fit in [fit_entropy(weight, None, most)]
    ]
    for bits, error in zip((2, 3, 4), errors, strict=True):
        bound = 4.0**-bits  # of a Gaussian
        decibels = 10 * math.log10(error / bound)
        assert 0.4 < decibels < 1.9, bits  # 0.6 of the trellis, and tables in a small layer


def test_codes_of_blocks_lose_more_at_as_many_bytes() -> None:
    weight, gram = _weight(256, 64), _gram(64)
    blocks = fit_full(weight, gram, None, 64, 4, damping=0.1, generator=torch.Generator().manual_seed(0))
    most = blocks.codes.numel() * 6 // 8 + 64 * 4 + 4
    fit = fit_entropy(weight, gram, most, damping=0.1)
    lost, other = (output_objective(weight, x.codebook, x.codes, gram) for x in (fit, blocks))
    assert lost < 0.85 * other


def test_the_result_scales_with_the_weight() -> None:
    weight, gram = _weight(100, 40), _gram(40)
    one, other = (fit_entropy(weight * scale, gram, 1300) for scale in (1.0, 2.0**-70))
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.codebook, other.codebook * 2.0**70)


def test_outliers_keep_the_codes_in_a_byte() -> None:
    weight = _weight(100, 50)
    weight[3, 4] = 1e4
    fit = fit_entropy(weight, None, 4000)
    assert len(fit.codebook) <= 256
    assert fit.size_bytes <= 4000


@pytest.mark.parametrize("weight", [torch.zeros(30, 20), torch.ones(30, 20), torch.eye(30)])
def test_degenerate_weights_are_coded(weight: Tensor) -> None:
    fit = fit_entropy(weight, None, 400)
    assert fit.size_bytes <= 400
    lost = (weight - fit.codebook[fit.codes].squeeze(2)).square().sum()
    assert float(lost) <= 0.05 * float(weight.square().sum())


def test_dead_columns_and_groups_are_coded() -> None:
    gram = _gram(40, groups=2)
    gram[0, :3] = 0
    gram[0, :, :3] = 0
    gram[1] = 0
    fit = fit_entropy(_weight(60, 40), gram, 900)
    assert bool(torch.isfinite(fit.codebook).all())


@pytest.mark.parametrize("flat", [0.0, 0.1, 8.0])
def test_the_search_takes_no_leap_where_levels_keep_the_bytes(flat: float) -> None:
    """From two points of next to the same bytes it goes no farther than four times what is usual for the bytes."""
    weights, aim, size = 19_200, 5_170.0, 5_458.0
    usual = 16 / weights * (size - aim)
    step = _next([(-6.1, size + flat), (-5.85, size)], aim, weights) + 5.85
    assert usual <= step <= 4 * usual + 1e-9
    steep = _next([(-6.1, size + 2000), (-5.85, size)], aim, weights) + 5.85
    assert steep == pytest.approx(0.25 / 2000 * (size - aim))


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes are too few for 5000 weights"):
        fit_entropy(_weight(100, 50), None, 15)


def test_weights_and_inputs_that_are_no_numbers_are_refused() -> None:
    weight = _weight(30, 20)
    with pytest.raises(ValueError, match="NaN or Inf"):
        fit_entropy(weight, _gram(20) * math.nan, 400)
    weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        fit_entropy(weight, None, 400)


def test_the_same_input_gives_the_same_codes() -> None:
    weight, gram = _weight(100, 40), _gram(40)
    one, other = (fit_entropy(weight, gram, 1300) for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.codebook, other.codebook)
