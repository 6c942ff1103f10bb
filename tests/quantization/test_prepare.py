"""Before the fit: the mode in which a network is fitted, its form, its budget, and whether it is rotated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Batch
from bgd_plugin.errors import ConfigError
from bgd_plugin.quantization import prepare
from bgd_plugin.quantization.prepare import prepared, prepared_for
from bgd_plugin.rotation import Rotated
from tests.networks import PlainNet, em, vectors

BATCHES = [Batch((x,)) for x in vectors()]


class _Optional(nn.Module):
    """Without its mask it traces in another way than with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return x if mask is None else self.c(x * mask)


@pytest.mark.parametrize("branches", [True, False])
def test_a_network_is_fitted_in_evaluation_mode_and_the_callers_stays(branches: bool) -> None:
    class Branching(PlainNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if not branches or float(x.abs().max()) > 0 else x

    model = Branching().train()
    first = prepared(model, em(), None)
    ready = prepared_for(first, model, em(), None, BATCHES)
    assert isinstance(ready.front.network, fx.GraphModule) != branches
    assert not any(module.training for module in ready.front.network.modules())
    assert all(module.training for module in model.modules())


def test_a_network_that_data_shows_in_another_form_is_surveyed_again() -> None:
    model = _Optional().eval()
    first = prepared(model, em(), 10**6)
    assert [layer.name for layer in first.survey.layers] == ["b"]
    same = prepared_for(first, model, em(), 10**6, BATCHES)
    assert same.survey is first.survey and same.front is first.front
    batches = [Batch((x, torch.ones(32))) for x in vectors()]
    other = prepared_for(first, model, em(), 10**6, batches)
    assert [layer.name for layer in other.survey.layers] == ["b", "c"]
    assert other.survey.original_bytes == first.survey.original_bytes == 10**6


class _Looks(PlainNet):
    """Computes with its last layer only if that is of torch's own class."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self[2](torch.relu(self[0](x))))
        return self[4](x) if type(self[4]) is nn.Linear else x[:, :5]


def test_a_layer_that_has_to_stay_float_is_no_part_of_the_budget() -> None:
    model, config = _Looks(64).eval(), bgd.BGDConfig(target_ratio=1.5)
    first = prepared(model, config, None)
    assert first.budget is not None and [layer.name for layer in first.budget.free] == ["2", "4"]
    ready = prepared_for(first, model, config, None, BATCHES)
    assert ready.budget is not None and [layer.name for layer in ready.budget.free] == ["2"]
    assert ready.budget.survey is ready.survey
    assert prepared(model, em(), None).budget is None


def test_nothing_to_quantize_and_budgets_out_of_reach_are_refused_without_data() -> None:
    with pytest.raises(ConfigError, match="no layer of the network can be quantized"):
        prepared(nn.Sequential(nn.Linear(12, 5)), em(), None)
    with pytest.raises(ConfigError, match="the least possible size is"):
        prepared(PlainNet(), bgd.BGDConfig(target_bytes=1), None)
    with pytest.raises(ConfigError, match="original_bytes=1"):
        prepared(PlainNet(), em(), 1)


@pytest.mark.parametrize(
    ("fields", "is_tried"),
    [
        ({"rotation": True, "method": "em"}, True),
        ({"rotation": "auto"}, True),
        ({"rotation": "auto", "method": "em"}, False),
        ({"rotation": "auto", "preserve_zeros": True}, False),
        ({"rotation": False}, False),
    ],
)
def test_rotation_is_tried_where_settings_allow_it(
    fields: dict[str, Any], is_tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    answer = Rotated(network=None, note="rotation: none found")
    monkeypatch.setattr(prepare, "rotated", lambda *arguments: tried.append(arguments) or answer)
    model, config = PlainNet().eval(), bgd.BGDConfig(max_divergence=None, seed=5, **fields)
    result = prepare._rotated(model, config, BATCHES)
    assert tried == ([(model, BATCHES, 5)] if is_tried else [])
    assert result == (answer if is_tried else Rotated(network=None, note=""))


@pytest.mark.parametrize(("sum_of_all", "agree"), [(0.0, True), (1.0, False), (2.0, True)])
def test_processes_rotate_together_or_not_at_all(
    sum_of_all: float, agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Rotated(network=PlainNet() if sum_of_all else None, note="mine")
    monkeypatch.setattr(prepare, "rotated", lambda *_: mine)
    monkeypatch.setattr(prepare, "processes", lambda: 2)
    monkeypatch.setattr(prepare, "total", lambda number: sum_of_all)
    found = prepare._rotated(PlainNet(), bgd.BGDConfig(rotation=True, max_divergence=None), BATCHES)
    assert found == (
        mine if agree else Rotated(network=None, note="rotation: none, since the processes do not agree on it")
    )


def test_the_rotated_network_is_what_is_fitted_and_its_note_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, turned = PlainNet().eval(), PlainNet().eval()
    monkeypatch.setattr(prepare, "_rotated", lambda *_: SimpleNamespace(network=turned, note="rotation: a stream"))
    ready = prepared_for(prepared(model, em(), None), model, em(), None, BATCHES)
    assert torch.equal(ready.front.network.get_parameter("2.weight"), turned[2].weight)
    assert ready.survey.notes[-1] == "rotation: a stream"
    monkeypatch.setattr(prepare, "_rotated", lambda *_: SimpleNamespace(network=None, note=""))
    ready = prepared_for(prepared(model, em(), None), model, em(), None, BATCHES)
    assert torch.equal(ready.front.network.get_parameter("2.weight"), model[2].weight)
    assert ready.survey.notes == ()
