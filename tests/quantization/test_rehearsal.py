"""Code that looks at its layers is noticed before the fit: these layers stay float, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from tests.networks import em, vectors


class Looks(nn.Module):
    """Computes with `b` only if it is a linear layer of torch's own class."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        y = torch.tanh(self.b(y) if type(self.b) is nn.Linear else y)
        y = self.c(y)
        return -y if self.branches and y.sum() > 1e9 else y


@pytest.mark.parametrize("branches", [False, True])
def test_a_layer_at_which_code_looks_stays_float(branches: bool) -> None:
    model, data = Looks(branches).eval(), vectors()
    result = bgd.quantize(model, data, em(), progress=False)
    assert [layer.name for layer in result.report.layers] == ["c"]
    reasons = {skipped.name: skipped.reason for skipped in result.report.skipped}
    assert reasons["b"].startswith("the network's code looks at its class, attributes or parameters")
    assert type(result.model.b) is nn.Linear


def test_code_that_looks_at_all_parameters_is_refused_before_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sums(Looks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(p.square().mean() for p in self.parameters())  # type: ignore[no-any-return]

    def never(*args: Any) -> Any:
        raise AssertionError("the fit has begun")

    monkeypatch.setattr("bgd_plugin.quantization.one_pass.quantize_layers", never)
    with pytest.raises(bgd.errors.ConfigError, match=r"no layer .* can be quantized: .*looks at its class"):
        bgd.quantize(Sums(branches=True), vectors(), em(), progress=False)


def test_a_budget_counts_with_what_is_left() -> None:
    model, data = Looks(branches=False).eval(), vectors(batch=16)
    result = bgd.quantize(model, data, bgd.BGDConfig(target_bytes=5200), progress=False)
    assert result.report.compressed_bytes <= 5200
    assert "b" in {skipped.name for skipped in result.report.skipped}
