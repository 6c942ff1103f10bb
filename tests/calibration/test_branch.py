"""A layer's output is followed to the addition of a skip connection, and no further."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.calibration.branch import BranchEnd

aten: Any = torch.ops.aten
X, W, SKIP = torch.randn(4, 3), torch.randn(3, 5), torch.randn(4, 5)


def _after(*operators: tuple[Any, Any]) -> tuple[BranchEnd, Tensor, list[Any]]:
    """Run a product, then operators on what it gave; what each of them was found to end."""
    end, found = BranchEnd(), []
    end.layer("a")
    value = X @ W
    end.before(aten.mm.default, (X, W))
    end.after(value)
    for operator, arguments in operators:
        args = arguments(value)
        ended = end.before(operator, args)
        found.append(None if ended is None else (ended[0], ended[1].clone()))  # an operator may write to it
        value = operator(*args)
        end.after(value)
    return end, value, found


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("operator", [aten.add.Tensor, aten.add_.Tensor])
def test_an_addition_to_the_output_ends_it(operator: Any, is_first: bool) -> None:
    pair = (lambda y: (y, SKIP)) if is_first else (lambda y: (SKIP.clone(), y))
    _, _, (ended,) = _after((operator, pair))
    assert ended is not None and ended[0] == "a" and torch.equal(ended[1], SKIP)


def test_a_bias_comes_before() -> None:
    bias = torch.randn(5)
    _, _, (first, second) = _after((aten.add.Tensor, lambda y: (y, bias)), (aten.add.Tensor, lambda y: (y, SKIP)))
    assert first is None and second is not None


@pytest.mark.parametrize("other", [torch.randn(4, 1), 2.0])
def test_what_is_neither_bias_nor_skip_is_the_end_without_one(other: Any) -> None:
    _, _, found = _after((aten.add.Tensor, lambda y: (y, other)), (aten.add.Tensor, lambda y: (y, SKIP)))
    assert found == [None, None]


def test_views_are_followed() -> None:
    _, _, found = _after(
        (aten.view.default, lambda y: (y, [2, 10])), (aten.add.Tensor, lambda y: (y, SKIP.view(2, 10)))
    )
    assert found[1] is not None


def test_an_output_that_is_added_to_itself_or_changed_in_place_ends_nothing() -> None:
    _, _, found = _after((aten.add.Tensor, lambda y: (y, y)), (aten.add.Tensor, lambda y: (y, SKIP)))
    assert found == [None, None]
    _, _, found = _after((aten.relu_.default, lambda y: (y,)), (aten.add.Tensor, lambda y: (y, SKIP)))
    assert found == [None, None]


def test_other_tensors_are_no_concern() -> None:
    _, _, found = _after((aten.add.Tensor, lambda y: (SKIP, SKIP)))
    assert found == [None]
    assert BranchEnd().before(aten.add.Tensor, (X, X)) is None


def test_an_output_ends_once() -> None:
    end, _, (ended,) = _after((aten.add.Tensor, lambda y: (y, SKIP)))
    assert ended is not None
    assert end.before(aten.add.Tensor, (SKIP, SKIP)) is None


def test_zeros_stand_for_a_plain_product_only() -> None:
    end = BranchEnd()
    assert end.blank(aten.mm.default, (X, W)) is None
    end.layer("a")
    assert end.blank(aten.bmm.default, (X[None], W[None])) is None
    for operator, args in ((aten.mm.default, (X, W)), (aten.addmm.default, (torch.ones(5), X, W))):
        zeros = end.blank(operator, args)
        assert zeros is not None and zeros.shape == (4, 5) and not zeros.any()
