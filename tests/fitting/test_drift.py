"""A residual branch is fitted to its own outputs and to the drift of its skip, in networks without a graph too."""

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Rerun

WIDTH = 16


class Branches(nn.Module):
    """Three residual branches; what the network does depends on a value, so it does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 32, bias=False) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(32, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().sum()) < 0:
            raise ValueError("cannot be")
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def _error(monkeypatch: pytest.MonkeyPatch, *, with_drift: bool) -> float:
    torch.manual_seed(0)
    model = Branches().eval()
    data = [torch.randn(256, WIDTH) for _ in range(4)]
    setting = bgd.LayerConfig(block_size=4, codebook_size=16)
    config = bgd.BGDConfig(linear=setting, first_layer=setting, kept_aside=0, asymmetric_step=1.0)
    with monkeypatch.context() as patch:
        if not with_drift:
            patch.setattr(Rerun, "drift", lambda self, name: None)
        result = bgd.quantize(model, data, config, progress=False)
    with torch.no_grad():
        return float((result.model(data[0]) - model(data[0])).square().sum() / model(data[0]).square().sum())


def test_the_drift_is_compensated_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _error(monkeypatch, with_drift=True) < 0.9 * _error(monkeypatch, with_drift=False)
