"""A plan with calibration data: the sizes that quantize would choose, and the curve of bytes against divergence."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from tests.networks import SmallResNet, images, randomized


def _wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    ).eval()


def _rows() -> list[torch.Tensor]:
    return [3 * torch.randn(16, 12) for _ in range(4)]


def test_it_chooses_as_quantize_does() -> None:
    model, data = _wide(), _rows()
    for config in (bgd.BGDConfig(target_ratio=4), bgd.BGDConfig(max_divergence=0.01)):
        plan = bgd.plan(model, config, data, progress=False)
        report = bgd.quantize(model, data, config, progress=False).report
        sizes = [(x.name, x.block_size, x.codebook_size) for x in plan.layers]
        assert [(x.name, x.block_size, x.codebook_size) for x in report.layers] == sizes
        assert plan.expected_divergence is not None


def test_a_looser_bound_makes_a_smaller_file() -> None:
    model, data = _wide(), _rows()
    plans = [bgd.plan(model, bgd.BGDConfig(max_divergence=b), data, progress=False) for b in (0.0001, 0.001, 0.01)]
    sizes = [plan.compressed_bytes for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for plan, bound in zip(plans, (0.0001, 0.001, 0.01), strict=True):
        assert plan.expected_divergence is not None
        assert plan.expected_divergence <= bound


def test_the_curve_falls_and_holds_the_chosen_point() -> None:
    plan = bgd.plan(_wide(), bgd.BGDConfig(max_divergence=0.01), _rows(), progress=False)
    sizes = [point.file_bytes for point in plan.curve]
    losses = [point.expected_divergence for point in plan.curve]
    assert len(sizes) > 8
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    # the chosen file lies on it: no point is both smaller and better
    assert plan.expected_divergence is not None
    assert not any(
        s < 0.99 * plan.compressed_bytes and loss < plan.expected_divergence
        for s, loss in zip(sizes, losses, strict=True)
    )
    assert json.loads(json.dumps(plan.to_dict()))["curve"][0]["file_bytes"] == sizes[0]
    assert "expected divergence" in str(plan)


def test_without_data_there_is_no_curve_and_the_bound_is_said_to_wait_for_data() -> None:
    plan = bgd.plan(_wide(), bgd.BGDConfig(max_divergence=0.01))
    assert plan.curve == ()
    assert any("was not measured" in note for note in plan.notes)


def test_a_plan_with_fixed_sizes_has_the_curve_too() -> None:
    model = randomized(SmallResNet())
    plan = bgd.plan(model, bgd.BGDConfig(), images(4, batch=8), progress=False)
    assert plan.layers == bgd.plan(model, bgd.BGDConfig()).layers
    assert len(plan.curve) > 3


def test_a_bound_that_leaves_everything_float_is_refused() -> None:
    with pytest.raises(bgd.BGDError, match="leaves every layer float: no layer is left to quantize"):
        bgd.plan(_wide(), bgd.BGDConfig(max_divergence=1e-12), _rows(), progress=False)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, "small"])
def test_bounds_that_are_none(value: object) -> None:
    with pytest.raises(bgd.BGDError, match=r"max_divergence=.*: give a positive number"):
        bgd.BGDConfig(max_divergence=value)  # type: ignore[arg-type]
