"""A plan with calibration data: the sizes that quantize would choose, and the curve of bytes against divergence."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import trace
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.measure import measured
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.quantization import quality
from bgd_plugin.support.tables import mib
from tests.networks import FunctionalNet, SmallResNet, images, randomized


def _wide() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    ).eval()
    model[-1].weight.data *= 10  # an answer tells something of the sample
    return model


def _rows() -> list[torch.Tensor]:
    return [3 * torch.randn(16, 12) for _ in range(4)]


def test_it_chooses_as_quantize_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first pass, before it knows what came out."""
    monkeypatch.setattr(quality, "_is_good_enough", lambda *_, **__: True)
    model, data = _wide(), _rows()
    for config in (bgd.BGDConfig(target_ratio=4), bgd.BGDConfig(max_divergence=0.01)):
        plan = bgd.plan(model, config, data, progress=False)
        report = bgd.quantize(model, data, config, progress=False).report
        sizes = [(x.name, x.block_size, x.codebook_size) for x in plan.layers]
        assert [(x.name, x.block_size, x.codebook_size) for x in report.layers] == sizes
        assert plan.expected_divergence is not None


def test_a_looser_bound_makes_a_smaller_file() -> None:
    model, data = _wide(), _rows()
    plans = [bgd.plan(model, bgd.BGDConfig(max_divergence=b), data, progress=False) for b in (1e-5, 1e-4, 1e-3)]
    sizes = [plan.compressed_bytes for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for plan, bound in zip(plans, (1e-5, 1e-4, 1e-3), strict=True):
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
    fixed = bgd.BGDConfig(max_divergence=None)
    plan = bgd.plan(model, fixed, images(4, batch=8), progress=False)
    assert plan.layers == bgd.plan(model, fixed).layers
    assert len(plan.curve) > 3


def test_of_a_bound_that_no_quantized_layer_keeps_to_one_layer_comes_nearest() -> None:
    plan = bgd.plan(_wide(), bgd.BGDConfig(max_divergence=1e-12), _rows(), progress=False)
    assert [x.block_size for x in plan.layers] == [1]
    assert any("only the layer that bears codes best" in note for note in plan.notes)


def test_sizes_that_are_set_stay_and_the_others_are_chosen() -> None:
    overrides = (("2", bgd.LayerConfig(block_size=8)), ("4", bgd.LayerConfig(codebook_size=32)))
    for data in (None, _rows()):
        plan = bgd.plan(_wide(), bgd.BGDConfig(overrides=overrides), data, progress=False)
        sizes = {x.name: (x.block_size, x.codebook_size) for x in plan.layers}
        assert sizes["2"] == (8, 64)  # 128 blocks in all, of 4,096 weights in 512
        assert sizes["4"][1] == 32


def test_where_all_sizes_are_set_a_bound_has_nothing_to_choose() -> None:
    fixed = bgd.BGDConfig(linear=bgd.LayerConfig(block_size=4))
    plan = bgd.plan(_wide(), fixed, _rows(), progress=False)
    assert {x.block_size for x in plan.layers} == {4}
    assert plan.expected_divergence is None
    report = bgd.quantize(_wide(), _rows(), fixed, progress=False).report
    assert not any("bound" in note for note in report.notes)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, "small"])
def test_bounds_that_are_none(value: object) -> None:
    with pytest.raises(bgd.BGDError, match=r"max_divergence=.*: give a positive number"):
        bgd.BGDConfig(max_divergence=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_of_the_measurements_can_be_turned_off(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = bgd.BGDConfig(target_ratio=4)
    bgd.plan(_wide(), config, _rows(), progress=progress)
    assert ("measure" in capsys.readouterr().err) == progress


def test_a_budget_says_which_zeros_stay() -> None:
    model = _wide()
    model[2].weight.data[:, ::2] = 0
    plan = bgd.plan(model, bgd.BGDConfig(target_ratio=8, preserve_zeros=True))
    notes = {layer.name: layer.note for layer in plan.layers}
    assert "zeros: " in notes["2"] and "bits/weight" in notes["2"] and notes["2"].startswith("budget: ")


def test_samples_that_quantize_keeps_aside_are_not_measured() -> None:
    """A few of them are so large that every loss would be another one."""
    model, data = _wide(), [torch.randn(10, 12) for _ in range(4)]
    aside = {int((place + 0.5) * 40 / 8) for place in range(8)}
    plans = []
    for factor in (1.0, 30.0):
        scaled = torch.cat(data) * torch.tensor([factor if i in aside else 1.0 for i in range(40)])[:, None]
        plans.append(bgd.plan(model, bgd.BGDConfig(target_ratio=6, kept_aside=0.2), scaled.split(10), progress=False))
    assert plans[0] == plans[1]


def test_a_chain_of_steps_keeps_the_bytes_it_started_from() -> None:
    plan = bgd.plan(_wide(), bgd.BGDConfig(target_ratio=6), _rows(), progress=False, original_bytes=60_000)
    assert plan.original_bytes == 60_000 and 9_000 < plan.compressed_bytes <= 10_000


def test_batches_of_another_form_are_given_as_the_function_says() -> None:
    def forward(model: nn.Module, batch: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        result: torch.Tensor = model(batch["rows"][0])
        return result

    config, data = bgd.BGDConfig(target_ratio=4), _rows()
    model = _wide()
    plain = bgd.plan(model, config, data, progress=False)
    other = bgd.plan(model, config, [{"rows": [x]} for x in data], forward=forward, progress=False)
    assert other == plain


def test_a_table_has_the_size_of_each_layer() -> None:
    plan = bgd.plan(_wide(), bgd.BGDConfig(max_divergence=None))
    lines = str(plan).splitlines()
    for layer in plan.layers:
        (line,) = [line for line in lines if line.split()[:1] == [layer.name]]
        assert mib(layer.compressed_bytes) in line and f"{layer.bits_per_weight:.2f}" in line


def test_measuring_leaves_weights_where_they_were() -> None:
    """While a function's weight is measured, a module gives it; afterwards it is a parameter again."""
    graph = trace(FunctionalNet().eval())
    budget = Budget.of(surveyed(graph, bgd.BGDConfig(target_ratio=2), original=graph))
    assert budget is not None
    names, modules = list(graph.state_dict()), list(dict(graph.named_modules()))
    batches = collect_batches(images(size=12), graph, device=torch.device("cpu"), forward=None)
    assert {"kernel", "matrix"} <= set(measured(budget, batches, progress=False).sensitivities)
    assert sorted(graph.state_dict()) == sorted(names) and list(dict(graph.named_modules())) == modules


class _Dropping(nn.Module):
    """Random while it is trained."""

    def __init__(self, *, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.norm, self.drop = nn.Linear(12, 64), nn.BatchNorm1d(64), nn.Dropout(0.5)
        self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.norm(self.a(x))))
        x = 4 * self.c(torch.relu(self.b(x)))
        return -x if self.branches and float(x.abs().max()) > 1e9 else x


@pytest.mark.parametrize("branches", [False, True])
def test_a_network_that_is_being_trained_is_measured_as_it_answers(branches: bool) -> None:
    model: nn.Module = randomized(_Dropping(branches=branches))
    data, config = _rows(), bgd.BGDConfig(target_ratio=4)
    plans = [bgd.plan(model.train(mode), config, data, progress=False) for mode in (False, True)]
    assert plans[0] == plans[1]
    assert all(module.training for module in model.modules())
