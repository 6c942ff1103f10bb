"""Small integers times one step: exact in half precision, near the values, and undone behind the layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bgd_plugin.encoding.small_integers import fold_to_integers, round_to_integers
from bgd_plugin.files.grids import Grids, group_size


def _values(seed: int, scale: float, *shape: int) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bits(value: Tensor) -> int:
    """The bits in which a file holds a tensor of small integers."""
    (group,) = Grids.of({"x": value.half()}).members
    return group_size(group).bit_length()


@given(seed=st.integers(0, 99), exponent=st.integers(-10, 12), bits=st.integers(2, 8))
def test_rounded_values_are_near_and_a_file_finds_their_grid(seed: int, exponent: int, bits: int) -> None:
    values = _values(seed, 2.0**exponent, 40)
    rounded = round_to_integers(values, bits)
    assert torch.equal(rounded.half().float(), rounded)
    step = float(values.abs().max()) / (2 ** (bits - 1) - 1)
    assert float((rounded - values).abs().max()) <= step * (0.5 + 1 / 8)  # its step has four bits
    assert _bits(rounded) <= bits


@pytest.mark.parametrize(
    "values", [torch.zeros(3), torch.tensor([1e5, 1.0]), torch.tensor([torch.inf]), torch.empty(0)]
)
def test_values_without_a_grid_in_half_precision_stay(values: Tensor) -> None:
    assert torch.equal(round_to_integers(values), values)


def test_rounding_again_changes_nothing() -> None:
    once = round_to_integers(_values(0, 0.3, 100))
    assert torch.equal(round_to_integers(once), once)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_folded_rows_are_integers_of_which_the_largest_is_used(bits: int) -> None:
    weight = _values(1, 0.1, 20, 1, 3, 3) * torch.logspace(-2, 1, 20).reshape(-1, 1, 1, 1)
    weight[4] = 0
    folded, factor = fold_to_integers(weight, bits)
    step = float(folded.abs().max()) / (2 ** (bits - 1) - 1)
    assert torch.frexp(torch.tensor(step))[0] == 0.5  # a power of two
    largest = (folded.flatten(1).abs().amax(1) / step).tolist()
    assert largest == [0.0 if row == 4 else 2 ** (bits - 1) - 1 for row in range(20)]
    assert float(factor[4]) == 1.0
    assert bool((factor > 0).all())
    undone = folded / factor.reshape(-1, 1, 1, 1)
    bound = 0.5 * step / factor
    assert bool(((undone - weight).flatten(1).abs().amax(1) <= 1.001 * bound).all())
    assert _bits(folded) <= bits


def test_the_usual_size_of_the_weights_is_kept() -> None:
    """What follows takes up the factors: they should be near 1."""
    weight = _values(2, 1e-3, 50, 1, 3, 3)
    _, factor = fold_to_integers(weight, 5)
    assert 0.4 < float(factor.log2().mean().exp2()) < 2.5
