"""What rounding float weights to 8 bits costs, and that a network in which it costs too much keeps half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.files.rounding import as_stored, round_weights_
from bgd_plugin.graph import find_layers, front_end, isolated_weights
from bgd_plugin.planning import rounded
from bgd_plugin.planning.outputs import LOGITS
from bgd_plugin.planning.perturbation import changed, holders
from bgd_plugin.planning.rounded import _rounded_alone, can_be_narrow, measure_rounding, narrow_bytes, roundings
from bgd_plugin.planning.survey import surveyed
from tests.calibration.test_rerun import untraceable
from tests.networks import randomized


class _Delicate(nn.Module):
    """Each row of the first layer has one large weight, which the input does not use, so that 8 bits are coarse."""

    def __init__(self, *, traces: bool = True, size: float = 40.0) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(24, 64), nn.Linear(64, 64), nn.Linear(64, 20)
        self.first.weight.data[:, -1] = size
        self.traces = traces

    def forward(self, x: Tensor) -> Tensor:
        if not self.traces:
            untraceable(x)
        logits: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return logits


def _delicate(**options: float) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = _Delicate(**options).eval()  # type: ignore[arg-type]
    model.head.weight.data *= 20
    data = torch.randn(256, 24)
    data[:, -1] = 0
    return model, list(data.split(64))


def _prepared(model: nn.Module, data: list[Tensor]) -> tuple[Any, Any, Any]:
    """Batches, the network's form in which layers are found, and its survey under default settings."""
    front = front_end(model)
    batches = collect_batches(data, model, device=torch.device("cpu"), forward=None)
    return batches, front, surveyed(front, bgd.BGDConfig(), original=model)


@torch.no_grad()
def test_the_cost_is_that_of_the_network_with_the_rounded_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first half of the samples; all weights together are tried on all of them."""
    model, data = _delicate()
    batches, front, survey = _prepared(model, data)
    alone: list[int] = []
    monkeypatch.setattr(rounded, "_rounded_alone", lambda *given: alone.append(len(given[1])) or _rounded_alone(*given))
    with isolated_weights(front.network, survey.everywhere):
        found = measure_rounding(front.network, batches, survey, LOGITS, 1e-9)
        exact = torch.cat([front.network(x) for x in data[:2]]).log_softmax(1)
    assert list(found) == ["first"] and alone == [len(batches) // 2]
    model.first.weight.data = as_stored(model.first.weight.detach(), "int8")
    rough = torch.cat([model(x) for x in data[:2]]).log_softmax(1)
    kl = float((exact.exp() * (exact - rough)).sum(1).mean())
    assert found["first"].per_error(kl) == pytest.approx(kl, rel=0.02)
    assert found["first"].narrow == 1


@torch.no_grad()
def test_a_graph_runs_from_the_rounded_layer_on() -> None:
    """And answers as the whole network does; another network runs from its inputs."""
    model, data = _delicate()
    batches, front, survey = _prepared(model, data)
    network: Any = front.network
    seen: list[str] = []
    for name in ("first", "second"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with isolated_weights(network, survey.everywhere):
        second = next(layer for layer in survey.everywhere if layer.name == "second")
        doubled = nn.Parameter(2 * second.weight.detach())
        changes = [(holder, name, doubled) for holder, name in holders(network, second)]
        ((name, answers),) = (
            (name, list(answers)) for name, answers in _rounded_alone(network, batches, [second], {"second": changes})
        )
        assert name == "second" and seen.count("first") == len(batches) == seen.count("second")
        with changed(changes):
            expected = [batch.call(network) for batch in batches]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(answers, expected, strict=True))
    assert not torch.equal(expected[0], network(data[0]))


def test_nothing_is_measured_where_all_of_it_is_minor() -> None:
    model, data = _delicate(size=0.1)
    batches, front, survey = _prepared(model, data)
    with isolated_weights(front.network, survey.everywhere):
        assert measure_rounding(front.network, batches, survey, LOGITS, 0.01) == {}


@pytest.mark.parametrize("traces", [True, False])
def test_a_first_layer_that_8_bits_spoil_keeps_half_precision(traces: bool, tmp_path: Path) -> None:
    model, data = _delicate(traces=traces)
    config = bgd.BGDConfig(max_divergence=0.003)
    rounded = _delicate(traces=traces)[0]
    round_weights_(rounded, {"first.weight": "int8"})
    with torch.no_grad():
        exact, rough = (torch.cat([net(x) for x in data]).log_softmax(1) for net in (model, rounded))
    assert float((exact.exp() * (exact - rough)).sum(1).mean()) > 0.003
    result = bgd.quantize(model, data, config, progress=False)
    assert result.report.answers is not None and result.report.answers.divergence <= 0.003
    assert torch.equal(result.model.first.weight, model.first.weight.half().float())
    bgd.save(result.model, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size == result.report.compressed_bytes
    plan = bgd.plan(model, config, data, progress=False)
    assert plan.compressed_bytes == pytest.approx(result.report.compressed_bytes, rel=0.3)


def test_a_first_layer_that_8_bits_do_not_hurt_takes_them() -> None:
    model, data = _delicate(size=0.1)
    result = bgd.quantize(model, data, bgd.BGDConfig(max_divergence=0.003), progress=False)
    assert torch.equal(result.model.first.weight, as_stored(model.first.weight.detach(), "int8"))


@pytest.mark.parametrize("size", [0.1, 40.0])
def test_the_bytes_of_a_budget_count_what_was_chosen_for_the_first_layer(size: float) -> None:
    model, data = _delicate(size=size)
    report = bgd.quantize(model, data, bgd.BGDConfig(target_bytes=8_500), progress=False).report
    assert 0.9 * 8_500 < report.compressed_bytes <= 8_500


def test_the_settings_and_the_dtype_allow_it() -> None:
    layer = find_layers(front_end(_delicate()[0]).network)[0][0]
    assert can_be_narrow(layer, bgd.BGDConfig()) and narrow_bytes(layer) == 64 * 24 + 4 * 64
    assert not can_be_narrow(layer, bgd.BGDConfig(weight_storage="float16"))
    double = find_layers(front_end(_delicate()[0].double()).network)[0][0]
    assert not can_be_narrow(double, bgd.BGDConfig())


def test_a_weight_in_half_precision_is_not_rounded_on_trial() -> None:
    front = front_end(_delicate()[0])
    survey = surveyed(front, bgd.BGDConfig(), original=front.own)
    assert list(roundings(front.network, survey, survey.everywhere)) == ["first"]
    kept = survey.budgeted(survey.chosen, {}, (), None, {"first.weight": "float16"})
    assert roundings(front.network, kept, kept.everywhere) == {}
    assert kept.storages == {"first.weight": "float16"}
    more = survey.budgeted(survey.chosen, {}, (), None, {"second.weight": "int8"})
    assert list(roundings(front.network, more, more.everywhere)) == ["second", "first"]


def test_rounding_keeps_ties() -> None:
    model = randomized(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].weight = model[0].weight
    exact = model[0].weight.detach().clone()
    round_weights_(model, {"0.weight": "int8"})
    assert model[1].weight is model[0].weight
    assert torch.equal(model[0].weight, as_stored(exact, "int8"))
