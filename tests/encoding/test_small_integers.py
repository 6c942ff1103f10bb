"""Small integers times one step: exact in half precision, near the values, and undone behind the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.small_integers import fold_to_integers
from bgd_plugin.files.grids import Grids, group_size


def _values(seed: int, scale: float, *shape: int) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bits(value: Tensor) -> int:
    """The bits in which a file holds a tensor of small integers."""
    (group,) = Grids.of({"x": value.half()}).members
    return group_size(group).bit_length()


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
