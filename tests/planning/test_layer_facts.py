"""What a layer's inputs say of it: the scale of its rows, and what an error counts, literally."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.graph import find_layers, trace
from bgd_plugin.planning.layer_facts import LayerFacts, layer_facts, spread_ratio
from bgd_plugin.pq.blocks import Geometry


def _facts(weight: Tensor, x: Tensor, *, norm: str | None = None, has_bias: bool = False, **fields: Any) -> LayerFacts:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data.copy_(weight)
    (layer,), _ = find_layers(trace(nn.Sequential(linear)))
    calls = [[(x, Geometry.linear())]]
    inputs, generator = CollectedInputs("0", calls, calls), torch.Generator().manual_seed(0)
    return layer_facts(inputs, layer, BGDConfig(**fields, max_divergence=None), generator, norm=norm, has_bias=has_bias)


def test_a_row_that_gives_next_to_nothing_is_scaled_like_the_mean_one() -> None:
    weight, x = torch.randn(6, 5), torch.randn(200, 5)
    weight[2] *= 1e-5
    facts = _facts(weight, x, norm="1")
    centred = (x - x.mean(0)).double()
    power = (centred @ weight.double().T).square().mean(0)
    power[2] = power.mean()
    torch.testing.assert_close(facts.scale[0].double(), power.rsqrt(), rtol=1e-4, atol=0)


def test_without_a_norm_all_rows_have_one_scale() -> None:
    weight, x = torch.randn(6, 5), torch.randn(200, 5) + 1
    facts = _facts(weight, x)
    power = (x.double() @ weight.double().T).square().mean(0).mean()
    torch.testing.assert_close(facts.scale[0].double(), power.rsqrt().expand(6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", [None, "1"])
def test_a_layer_that_gives_nothing_has_a_finite_scale(norm: str | None) -> None:
    for facts in (
        _facts(torch.zeros(6, 5), torch.randn(99, 5), norm=norm),
        _facts(torch.ones(6, 5), torch.zeros(99, 5), norm=norm),
    ):
        assert bool(torch.isfinite(facts.scale).all()) and bool((facts.scale > 0).all())


def test_a_mean_counts_unless_something_takes_it_out() -> None:
    weight, x = torch.randn(6, 5), torch.randn(200, 5) + 3
    raw, centred = x.double(), (x - x.mean(0)).double()
    for fields, is_centred in (
        ({"has_bias": True}, True),
        ({"norm": "1"}, True),
        ({}, False),
        ({"has_bias": True, "method": "em"}, False),
        ({"norm": "1", "method": "em"}, True),
    ):
        facts, rows = _facts(weight, x, **fields), centred if is_centred else raw  # type: ignore[arg-type]
        torch.testing.assert_close(facts.covariance[0].double(), rows.T @ rows / 200, rtol=1e-4, atol=1e-4)
        assert facts.takes_mean == is_centred
        torch.testing.assert_close(facts.mean[0], x.mean(0))


@pytest.mark.parametrize(("rows", "method", "expected"), [(9, "full", False), (10, "full", True), (99, "em", False)])
def test_feedback_makes_good_only_where_rows_are_many(rows: int, method: Any, expected: bool) -> None:
    facts = _facts(torch.randn(6, 5), torch.randn(rows, 5), method=method)
    assert (facts.root is not None) == expected
    assert facts.damping == pytest.approx(min(1.0, 0.2 * (1 + 5 / rows)))


def test_the_spread_that_a_norm_gives_back_is_bounded() -> None:
    weight, x = torch.randn(4, 5), torch.randn(200, 5)
    facts = _facts(weight, x, norm="1")
    rough = facts.weight * torch.tensor([1.0, 0.5, 1e-6, 1e6])[:, None]
    torch.testing.assert_close(spread_ratio(facts, rough)[0], torch.tensor([1.0, 2.0, 20.0, 0.05]), rtol=1e-4, atol=0)
