"""Small integers with error feedback: a literal search as the oracle, and what the feedback is good for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.small_integers import fold_to_integers
from bgd_plugin.pq.integers import integers_with_feedback


def _case(channels: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights, and Grams of inputs that are alike, as those of neighbouring pixels are."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(channels, 40, columns, generator=generator)
    inputs = inputs + 2 * torch.randn(channels, 40, 1, generator=generator)
    return torch.randn(channels, 1, columns, generator=generator), (inputs.mT @ inputs / 40).double()


def _error(weight: Tensor, found: Tensor, factor: Tensor, gram: Tensor) -> Tensor:
    """Of each row's outputs."""
    off = weight.flatten(1).double() - found.flatten(1).double() / factor.double()[:, None]
    return torch.einsum("ri,rij,rj->r", off, gram, off)


def test_without_correlations_it_is_plain_rounding() -> None:
    weight, _ = _case(6, 9)
    plain, factor = fold_to_integers(weight, 5)
    found, same = integers_with_feedback(weight, 5, torch.eye(9).expand(6, 9, 9))
    assert torch.equal(found, plain)
    assert torch.equal(same, factor)


def test_one_correlation_by_hand() -> None:
    """Two inputs that are nearly the same: 0.4 becomes 0, and the next 0.4, with what that lost, becomes 1."""
    weight = torch.tensor([[[7.0, 0.4, 0.4]]])
    gram = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.999], [0.0, 0.999, 1.0]]])
    plain, _ = fold_to_integers(weight, 4)
    found, factor = integers_with_feedback(weight, 4, gram)
    assert plain.flatten().tolist() == [7, 0, 0]
    assert found.flatten().tolist() == [7, 0, 1]
    assert factor.tolist() == [1.0]


def test_errors_are_near_the_least_that_integers_can_have() -> None:
    weight, gram = _case(5, 4)
    found, factor = integers_with_feedback(weight, 3, gram)
    plain, _ = fold_to_integers(weight, 3)
    step = float(plain.abs().max()) / 3
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float64) * step
    least = torch.stack(
        [
            torch.stack(
                [_error(weight[r : r + 1], x[None], factor[r : r + 1], gram[r : r + 1])[0] for x in every]
            ).min()
            for r in range(5)
        ]
    )
    error, other = (_error(weight, x, factor, gram) for x in (found, plain))
    assert bool((error >= least - 1e-9).all())
    assert float(error.sum()) < 0.7 * float(other.sum())
    assert float(error.sum()) < 2 * float(least.sum())


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_integers_stay_within_their_bits(bits: int) -> None:
    weight, gram = _case(20, 9)
    weight[3] = 0
    found, factor = integers_with_feedback(weight, bits, gram)
    assert found.shape == weight.shape and factor.shape == (20,)
    step = found[found != 0].abs().min()
    numbers = found / step
    assert torch.equal(numbers, numbers.round())
    assert float(numbers.abs().max()) <= 2 ** (bits - 1) - 1
    assert not bool(found[3].any()) and float(factor[3]) == 1
