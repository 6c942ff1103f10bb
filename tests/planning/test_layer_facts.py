"""What a layer's inputs say of it: the scale of its rows, and what an error counts, literally."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.graph import find_layers, trace
from bgd_plugin.planning.layer_facts import LayerFacts, layer_facts, roughly_quantized, rounding_error, spread_ratio
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


def test_rounding_a_codebook_costs_a_twelfth_of_a_step_squared() -> None:
    """In units of the inputs' mean variance; a step is the largest weight over 127."""
    x = torch.randn(200, 5) * torch.tensor([1.0, 2.0, 3.0, 0.5, 0.1])
    facts = _facts(torch.randn(6, 5), x)
    scaled = torch.tensor([[[0.5, -2.54, 1.0, 0.0, 0.2]]])
    expected = (2.54 / 127) ** 2 / 12 * float(x.double().square().mean(0).mean())
    assert rounding_error(scaled, facts) == pytest.approx(expected, rel=1e-4)


def test_metrics_are_those_of_the_error_that_feedback_leaves() -> None:
    """V_II V_IIᵀ of the Gram's factor, or without feedback the mean of the Gram's own blocks."""
    x = torch.randn(400, 6)
    facts = _facts(torch.randn(8, 6), x)
    assert facts.root is not None
    torch.testing.assert_close(facts.root @ facts.root.mT, facts.gram)
    assert torch.equal(facts.root, facts.root.triu())
    found = facts.metrics(3)
    inverse = torch.linalg.inv(facts.gram[0])
    torch.testing.assert_close(found[0, 0], torch.linalg.inv(inverse[:3, :3]))
    last = facts.gram[0, 3:, 3:]
    torch.testing.assert_close(found[0, 1], last)  # nothing comes behind it
    plain = _facts(torch.randn(8, 6), x, method="em")
    mean = (plain.gram[0, :3, :3] + plain.gram[0, 3:, 3:]) / 2
    torch.testing.assert_close(plain.metrics(3), mean.expand(1, 2, 3, 3))


def test_a_rough_weight_consists_of_codewords() -> None:
    facts = _facts(torch.randn(8, 6), torch.randn(400, 6))
    codebook = torch.randn(5, 3, dtype=torch.float32)
    for one in (facts, dataclasses.replace(facts, root=None)):
        rough = roughly_quantized(one.weight, one, codebook)
        assert rough.shape == (1, 8, 6)
        distances = torch.cdist(rough.reshape(-1, 3), codebook)
        assert float(distances.min(1).values.max()) < 1e-4
    plain = roughly_quantized(facts.weight, dataclasses.replace(facts, root=None), codebook)
    metric = dataclasses.replace(facts, root=None).metrics(3)[0, 0].float()
    for row in range(8):
        for place in range(2):
            off = facts.weight[0, row, 3 * place : 3 * place + 3] - codebook
            best = codebook[((off @ metric) * off).sum(1).argmin()]
            torch.testing.assert_close(plain[0, row, 3 * place : 3 * place + 3], best)
