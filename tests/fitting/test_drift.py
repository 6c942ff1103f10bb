"""A residual branch is fitted to its own outputs and to the drift of its skip, in networks without a graph too."""

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Rerun
from bgd_plugin.fitting import method_full_gram
from bgd_plugin.pq.target_asymmetric import asymmetric_target

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
            patch.setattr(Rerun, "skip", lambda self, name: None)
        result = bgd.quantize(model, data, config, progress=False)
    with torch.no_grad():
        return float((result.model(data[0]) - model(data[0])).square().sum() / model(data[0]).square().sum())


def test_the_drift_is_compensated_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _error(monkeypatch, with_drift=True) < 0.9 * _error(monkeypatch, with_drift=False)


class Stream(nn.Module):
    """Residual branches behind norms, as in a language model; the first position of each text is a sink.

    The second branch makes that position's stream 300 times larger than any other's, and all others read it a little.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(5))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 32, bias=False) for _ in range(5))
        self.downs = nn.ModuleList(nn.Linear(32, WIDTH, bias=False) for _ in range(5))
        self.register_buffer("sink", torch.zeros(1, 12, 1))
        self.sink[:, 0] = 1

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().sum()) < 0:
            raise ValueError("cannot be")
        for number, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs, strict=True)):
            y = norm(x)
            y = y + 0.7 * y[:, :1]
            hidden = torch.relu(up(y))
            if number == 1:
                hidden = hidden * (1 + 2000 * self.sink)
            x = x + down(hidden)
        return x


def _ordinary_error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    wanted, found = (nn.functional.rms_norm(network(x)[:, 1:], (WIDTH,)) for network in (model, other))
    return float((found - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_one_huge_position_does_not_ruin_the_others(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    torch.manual_seed(seed)
    model = Stream().eval()
    data = [torch.randn(32, 12, WIDTH) for _ in range(6)]
    setting = bgd.LayerConfig(block_size=2, codebook_size=64)
    config = bgd.BGDConfig(linear=setting, first_layer=setting, kept_aside=0, max_divergence=None)
    errors = {}
    for name in ("as it is", "without drift", "all alike"):
        with torch.no_grad(), monkeypatch.context() as patch:
            if name == "without drift":
                patch.setattr(Rerun, "skip", lambda self, name: None)
            if name == "all alike":
                patch.setattr(method_full_gram, "relative_weights", lambda stream: torch.ones(len(stream)))
            result = bgd.quantize(model, data[:5], config, progress=False)
            errors[name] = _ordinary_error(model, result.model, data[5])
    assert errors["as it is"] < errors["without drift"] < 0.02 < 1 < errors["all alike"]


@pytest.mark.parametrize("bias", [False, True])
def test_the_target_has_a_constant_only_where_a_bias_can_take_it(
    monkeypatch: pytest.MonkeyPatch, *, bias: bool
) -> None:
    targets = []

    def watching(weight: Tensor, gram: Tensor, cross: Tensor, **options: float) -> Tensor:
        targets.append((gram.clone(), cross.clone()))
        return asymmetric_target(weight, gram, cross, **options)

    monkeypatch.setattr(method_full_gram, "asymmetric_target", watching)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=bias), nn.ReLU()).eval()
    setting = bgd.LayerConfig(block_size=2, codebook_size=16)
    config = bgd.BGDConfig(first_layer=setting, kept_aside=0, max_divergence=None)
    x = torch.randn(4096, 8) + 3
    bgd.quantize(model, [x], config, progress=False)
    ((gram, cross),) = targets
    rows, outputs = x.double(), x.double() @ model[0].weight.detach().double().T
    if bias:
        rows, outputs = rows - rows.mean(0), outputs - outputs.mean(0)
    torch.testing.assert_close(gram[0].double(), rows.T @ rows / 4096, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cross[0].double(), rows.T @ outputs / 4096, rtol=1e-4, atol=1e-4)
