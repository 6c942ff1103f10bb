"""All errors tried together: on which samples, at which size, and what is kept of the float network's answers."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import Batch, Batches
from bgd_plugin.graph import copy_module, trace
from bgd_plugin.planning import measure
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.measure import Measurements, measured
from bgd_plugin.planning.outputs import LOGITS, Scale
from bgd_plugin.planning.survey import surveyed
from tests.networks import PlainNet, vectors


def _batches(*sizes: int) -> list[Batch]:
    return [Batch((torch.randn(size, 12, generator=torch.Generator().manual_seed(size)),)) for size in sizes]


def _budget() -> Budget:
    torch.manual_seed(0)
    model = PlainNet(64).eval()
    budget = Budget.of(surveyed(trace(copy_module(model)), BGDConfig(target_ratio=3.5), original=model))
    assert budget is not None
    return budget


def _made(budget: Budget, aside: list[Batch], **fields: Any) -> Measurements:
    parts: dict[str, Any] = {"batches": _batches(40, 40), "sensitivities": {}, "layers": {}, "scale": LOGITS}
    return Measurements(budget=budget, aside=aside, **(parts | fields))


@pytest.mark.parametrize(("aside", "expected"), [([8, 8], [8, 8]), ([8, 7], [40, 24]), ([], [40, 24])])
def test_errors_are_tried_on_samples_kept_aside_if_there_are_16(
    aside: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def compared(found: Any, exact: Any, batches: Any, **fields: Any) -> Any:
        given.update(fields, sizes=[batch.size for batch in batches])
        return SimpleNamespace(divergence=0.5)

    monkeypatch.setattr(measure, "compare_answers", compared)
    budget = _budget()
    scale = Scale(measure="squared difference")
    assert _made(budget, _batches(*aside), scale=scale).joint(budget.survey) == 0.5
    assert given == {"sizes": expected, "kept_aside": False, "measure": "squared difference"}


@pytest.mark.parametrize(("tokens", "expected"), [(32, [4, 4]), (31, [40, 24]), (None, [40, 24])])
def test_few_samples_are_enough_if_they_have_256_tokens(
    tokens: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Language(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"logits": torch.zeros(len(x), 5) if tokens is None else torch.zeros(len(x), tokens, 5)}

    def compared(found: Any, exact: Any, batches: Any, **fields: Any) -> Any:
        sizes.extend(batch.size for batch in batches)
        return SimpleNamespace(divergence=0.5)

    monkeypatch.setattr(measure, "compare_answers", compared)
    monkeypatch.setattr(measure, "_apart", lambda budget: nullcontext(Language()))
    monkeypatch.setattr(measure, "roundings", lambda *_: {})
    budget = _budget()
    made = _made(budget, _batches(4, 4))
    made.joint(budget.survey)
    assert sizes == expected
    made.joint(budget.survey)
    assert sizes == 2 * expected


@pytest.mark.parametrize(("bound", "kept"), [(4 * 4 * 2048, True), (4 * 4 * 2048 - 16, False), (None, False)])
def test_answers_are_kept_in_memory_for_calibration_while_trials_follow_each_other(
    bound: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_KEPT", 1)
    network, few, batches = nn.Linear(12, 64), _batches(16, 16), Batches.of(_batches(40), bound)
    made = _made(_budget(), few, batches=batches)
    with made.prepared():
        answers = made._exact(network, few)
        assert all(answers(batch).shape == (16, 64) for batch in few)
        assert len(made._answers) == (2 if kept else 0)
    assert not made._answers
    made._exact(network, few)(few[0])
    assert not made._answers


def test_each_layers_error_has_the_size_expected_and_the_energy_left(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: dict[str, float] = {}
    monkeypatch.setattr(measure, "_shares", lambda count, config: [1.0] * count)
    monkeypatch.setattr(measure, "changes_of", lambda network, error, scale: scales.update({error: scale}) or [])
    budget = _budget()
    expected = SimpleNamespace(error_of=lambda planned: 0.09)
    layers = {"2": SimpleNamespace(sensitivity=expected, size=0.01, error="2")}
    made = _made(budget, _batches(16), layers=layers)
    assert [layer.name for layer in budget.survey.layers] == ["2", "4"]  # one has not been measured
    made.joint(budget.survey)
    made.joint(budget.survey, 0.25)
    assert scales == {"2": pytest.approx(1.5)}
    made.joint(budget.survey)
    assert scales == {"2": pytest.approx(3.0)}


@pytest.mark.parametrize("room", [True, False])
def test_the_float_networks_answers_are_kept_where_that_takes_no_room(
    room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_KEPT", 2 * 16 * 64 if room else 2 * 16 * 64 - 1)
    runs: list[int] = []
    network = nn.Linear(12, 64)
    network.register_forward_hook(lambda *_: runs.append(1))
    few = _batches(16, 16)
    made = _made(_budget(), few)
    for _ in range(2):
        answers = made._exact(network, few)
        found = [answers(batch) for batch in few]
        assert all(
            torch.equal(a, network.weight @ b.args[0].T + network.bias[:, None]) or a.shape == (16, 64)
            for a, b in zip(found, few, strict=True)
        )
    assert len(runs) == (2 if room else 4)


@pytest.mark.parametrize("shown", [True, False])
def test_each_free_layer_is_measured_and_the_network_is_as_before(
    shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = _budget()
    before: dict[str, Tensor] = {name: value.clone() for name, value in budget.survey.network.state_dict().items()}
    batches = [Batch((x,)) for x in vectors()]
    found = measured(budget, batches, [], progress=shown)
    assert list(found.layers) == ["2", "4"]
    assert found.layers.items() and all(
        found.sensitivities[name] == one.sensitivity for name, one in found.layers.items()
    )
    assert found.scale == next(iter(found.layers.values())).scale and found.batches is batches
    assert ("2/2" in (drawn := capsys.readouterr().err) or "3/3" in drawn) == shown
    assert all(torch.equal(value, before[name]) for name, value in budget.survey.network.state_dict().items())
