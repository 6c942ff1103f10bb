"""A shift of biases: every module that holds the weight gets it, and what was one parameter stays one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin.correction import absorb_row_scale_, row_scale_bounds, shift_biases_
from bgd_plugin.graph import find_layers, trace


class _Tied(nn.Module):
    """Three layers with one weight: two share their bias, the third has one of its own, the fourth none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.d = nn.Linear(8, 8, bias=False)
        for other in (self.b, self.c, self.d):
            other.weight = self.a.weight
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_modules_that_share_a_weight_are_shifted_and_ties_are_kept() -> None:
    graph = trace(_Tied().eval())
    (layer,) = find_layers(graph)[0]
    before = {name: getattr(graph, name).bias for name in "abc"}
    values = {name: bias.detach().clone() for name, bias in before.items()}
    shift_biases_(graph, layer, torch.arange(8.0))
    for name in "abc":
        torch.testing.assert_close(getattr(graph, name).bias.detach(), values[name] + torch.arange(8.0))
        assert torch.equal(before[name], values[name])  # the float network may share the old ones
    assert graph.a.bias is graph.b.bias is not graph.c.bias  # type: ignore[union-attr]
    assert graph.d.bias is None  # type: ignore[union-attr]


def test_a_layer_without_a_bias_stays_without() -> None:
    graph = trace(nn.Sequential(nn.Linear(8, 8, bias=False)).eval())
    (layer,) = find_layers(graph)[0]
    shift_biases_(graph, layer, torch.ones(8))
    assert graph.get_submodule("0").bias is None


def test_bounds_of_scales_leave_the_variance_above_eps_and_the_statistics_within_their_type() -> None:
    """√(2 eps)/σ ≤ scale ≤ √(max/4)/σ, and scale · |μ| ≤ max/4."""
    norm: Any = nn.BatchNorm1d(4, eps=1e-3)
    norm.running_var.copy_(torch.tensor([1e-9, 0.5, 2.0, 2.0]))
    norm.running_mean.copy_(torch.tensor([0.0, 0.1, 1e37, -1e37]))
    least, largest = row_scale_bounds(norm)
    sigma, limit = (norm.running_var.double() + 1e-3).sqrt(), torch.finfo(torch.float32).max / 4
    torch.testing.assert_close(least, 0.002**0.5 / sigma)
    free = limit**0.5 / sigma
    torch.testing.assert_close(largest, torch.minimum(free, limit / norm.running_mean.double().abs()))
    assert bool((largest[2:] < free[2:]).all()) and bool((largest[:2] == free[:2]).all())


def test_where_the_mean_leaves_no_room_the_smallest_factor_is_the_largest() -> None:
    norm: Any = nn.BatchNorm1d(2)
    norm.running_var.zero_()
    norm.running_mean.copy_(torch.tensor([0.0, 1e38]))
    least, largest = row_scale_bounds(norm)
    assert float(least[0]) == pytest.approx(2**0.5, rel=1e-6) and float(least[1]) == float(largest[1]) < 1


class _ByFunctions(nn.Module):
    """Two calls of one weight, each with a bias of its own that it is given as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            torch.tanh(functional.linear(x, self.a.weight, self.a.bias)), self.b.weight, self.b.bias
        )


def test_of_functions_only_the_bias_that_is_known_is_shifted() -> None:
    graph = trace(_ByFunctions().eval())
    (layer,) = find_layers(graph)[0]
    assert layer.functional and layer.tied
    before = [getattr(graph, name).bias.detach().clone() for name in "ab"]
    shift_biases_(graph, layer, torch.ones(8))
    torch.testing.assert_close(graph.a.bias.detach(), before[0] + (layer.bias is not None))  # type: ignore[union-attr,operator]
    assert torch.equal(graph.b.bias, before[1])  # type: ignore[union-attr,arg-type]


def test_a_norm_that_takes_up_a_scale_gives_the_same_outputs() -> None:
    """Also where eps is most of the variance."""
    norm: Any = nn.BatchNorm1d(3, eps=1e-2).eval()
    norm.running_var.copy_(torch.tensor([1e-3, 0.5, 2.0]))
    norm.running_mean.copy_(torch.tensor([0.1, -1.0, 2.0]))
    x, scale = torch.randn(20, 3), torch.tensor([2.0, 3.0, 0.5])
    expected = norm(x)
    absorb_row_scale_(norm, scale)
    torch.testing.assert_close(norm(x * scale), expected, rtol=1e-4, atol=1e-5)
