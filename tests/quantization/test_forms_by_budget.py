"""codes="trellis": a bound or a budget chooses between blocks and trellis codes, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.errors import ConfigError
from bgd_plugin.nn import PQModule
from bgd_plugin.planning import sensitivity
from tests.networks import same_outputs

DATA = [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
RATIO = 11.0


class Net(nn.Module):
    """Wide layers with normal weights, which trellis codes suit, and a last layer with too few rows for them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 160), nn.Linear(160, 160), nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.second(self.first(x).relu()).relu())
        return result


class Branching(Net):
    """The same, but what it runs depends on values, so that it has no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().max()) > 0 else x.new_zeros(len(x), 10)


def _net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(1)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return net.eval()


def _config(**fields: Any) -> bgd.BGDConfig:
    return bgd.BGDConfig(**({"codes": "trellis", "first_layer": bgd.LayerConfig(), "target_ratio": RATIO} | fields))


def _forms(model: nn.Module) -> dict[str, str]:
    return {name: module.form.name for name, module in model.named_modules() if isinstance(module, PQModule)}


def _error(model: nn.Module) -> float:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        wanted = _net()(x)
        return float((model(x) - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("kind", [Net, Branching])
def test_a_budget_takes_them_where_they_lose_less(kind: type[Net], tmp_path: Path) -> None:
    results = [
        bgd.quantize(_net(kind), DATA, _config(codes=codes), progress=False, checkpoint=tmp_path / codes)
        for codes in ("trellis", "blocks")
    ]
    model = results[0].model
    forms = _forms(model)
    assert "trellis" in forms.values() and forms.get("last") != "trellis"
    assert set(_forms(results[1].model).values()) == {"blocks"}
    assert _error(model) < 0.95 * _error(results[1].model)
    length = bgd.save(model, tmp_path / "net")
    assert length == results[0].report.compressed_bytes <= results[0].report.original_bytes / RATIO
    assert same_outputs(model, bgd.load(tmp_path / "net", like=kind()).eval(), DATA)
    again = bgd.quantize(_net(kind), DATA, _config(), progress=False, checkpoint=tmp_path / "trellis")
    assert bgd.save(again.model, tmp_path / "again") == length
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


def test_a_bound_takes_them_too() -> None:
    bound = {"target_ratio": None, "max_divergence": 1.0}
    found = bgd.quantize(_net(), DATA, _config(**bound), progress=False)
    assert "trellis" in _forms(found.model).values()
    plans = [bgd.plan(_net(), _config(**bound, codes=codes), DATA) for codes in ("trellis", "blocks")]
    assert plans[0].compressed_bytes < plans[1].compressed_bytes


def test_a_plan_without_data_has_them_and_zeros_may_be_kept() -> None:
    assert "trellis" in {layer.codes for layer in bgd.plan(_net(), _config()).layers}
    net = _net()
    with torch.no_grad():
        net.second.weight[torch.rand(160, 160) < 0.3] = 0
    result = bgd.quantize(net, DATA, _config(preserve_zeros=True, target_ratio=9.0), progress=False)
    assert _forms(result.model)["second"] == "trellis"
    assert not bool(bgd.materialize(result.model).second.weight[net.second.weight == 0].any())


def test_nothing_is_searched_where_they_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "window_error", lambda *_: pytest.fail("searched"))
    bgd.quantize(_net(), DATA[:2], _config(codes="blocks"), progress=False)


def test_a_budget_is_needed() -> None:
    with pytest.raises(ConfigError, match="lets a budget choose between blocks and trellis codes"):
        bgd.BGDConfig(codes="trellis", max_divergence=None)
    assert bgd.BGDConfig.from_json(_config().to_json()) == _config()
