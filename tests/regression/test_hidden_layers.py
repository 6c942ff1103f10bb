"""Layers whose inputs no node shows, and weights that are tied or computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bgd_plugin as bgd
from bgd_plugin.nn import PQLinear, PQModule, PQWeight
from tests.networks import em, same_outputs, vectors
from tests.regression.fine import FINE, quantize_finely


class Attention(nn.Module):
    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        other = x if self.attention.kdim == 12 else y
        return self.last(self.attention(y, other, other, need_weights=False)[0])


def _sequences(batches: int = 3) -> list[Tensor]:
    return [v.reshape(2, 4, 12) for v in vectors(batches)]


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize("kdim", [None, 12])
def test_projections_of_attention_are_quantized(kdim: int | None, method: Any, tmp_path: Path) -> None:
    model = Attention(kdim).eval()
    result = quantize_finely(model, _sequences(), em(method=method))
    names = ["attention.in_proj_weight"] if kdim is None else [f"attention.{x}_proj_weight" for x in "qkv"]
    assert [x.name for x in result.report.layers] == [*names, "attention.out_proj", "last"]
    assert all(0 < x.relative_error < 1 for x in result.report.layers)
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=Attention(kdim).eval()), _sequences())
    dense = bgd.materialize(result.model)
    assert isinstance(dense.attention._parameters[names[0].split(".")[1]], nn.Parameter)
    assert not any(isinstance(m, PQModule) for m in dense.modules())
    for batch in _sequences():  # torch multiplies in another order where a weight may want gradients
        torch.testing.assert_close(result.model(batch), dense(batch))


def test_attention_computes_with_the_decoded_projections() -> None:
    model = Attention().eval()
    student: Any = quantize_finely(model, _sequences()).model
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "last.weight"):
        owner = student.get_submodule(name.rpartition(".")[0])
        model.get_parameter(name).data = getattr(owner, name.rpartition(".")[2]).detach().clone()
    with torch.no_grad():
        for batch in _sequences():
            torch.testing.assert_close(student(batch), model(batch))


def test_the_error_of_a_hidden_projection_is_that_on_its_inputs() -> None:
    model = Attention().eval()
    result = quantize_finely(model, _sequences())
    with torch.no_grad():
        rows = torch.cat([model.first(x).flatten(0, 1) for x in _sequences()])
        lost = model.attention.in_proj_weight - result.model.attention.in_proj_weight
        expected = float((rows @ lost.T).square().sum() / (rows @ model.attention.in_proj_weight.T).square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-4)


def test_a_network_with_a_computed_parameter_is_copied_and_pickled(tmp_path: Path) -> None:
    student = quantize_finely(Attention().eval(), _sequences()).model.attention
    torch.save(student, tmp_path / "attention.pt")
    again = torch.load(tmp_path / "attention.pt", weights_only=False)
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        for other in (copy.deepcopy(student), again):
            assert torch.equal(student(x, x, x)[0], other(x, x, x)[0])


class _OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if x.sum() > -1e9 else x


def test_a_subclass_with_a_forward_of_its_own_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(12, 16), _OwnForward(16, 16))
    result = quantize_finely(model, vectors())
    assert isinstance(result.model[1], _OwnForward)
    assert isinstance(result.model[1]._modules["weight"], PQWeight)
    assert result.report.layers[0].relative_error > 0


def _tied(branch: bool) -> Any:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            if branch and x.sum() < -1e9:
                return x
            return self.c(torch.tanh(self.b(x)))

    return Tied()


@pytest.mark.parametrize("branch", [False, True])
def test_tied_layers_stay_tied_and_are_stored_once(branch: bool, tmp_path: Path) -> None:
    model = _tied(branch)
    plan = bgd.plan(model, em())
    assert [(x.name, x.note.partition(";")[2].strip()) for x in plan.layers] == [("b", "tied to c")]
    result = quantize_finely(model, vectors())
    assert plan.compressed_bytes == result.report.compressed_bytes
    assert plan.paper_bytes == result.report.paper_bytes
    bgd.save(result.model, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=_tied(branch))
    for net in (result.model, loaded):
        assert isinstance(net.c, PQLinear)
        assert net.b.codebook is net.c.codebook
        assert net.b.codes.data_ptr() == net.c.codes.data_ptr()
        assert not torch.equal(net.b.bias, net.c.bias)
    assert same_outputs(result.model, loaded, vectors())
    dense = bgd.materialize(loaded)
    assert dense.b.weight is dense.c.weight
    assert same_outputs(result.model, dense, vectors())


def test_float_parameters_that_are_tied_stay_so_after_loading(tmp_path: Path) -> None:
    def network() -> Any:
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16))
        model[3].weight = model[2].weight
        return model

    result = quantize_finely(network(), vectors())
    bgd.save(result.model, tmp_path / "net")
    loaded: Any = bgd.load(tmp_path / "net", like=network())
    assert loaded.get_submodule("2").weight is loaded.get_submodule("3").weight


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (parametrizations.weight_norm, "WeightNorm"),
        (parametrizations.spectral_norm, "SpectralNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
    ],
)
def test_parametrized_weights_are_folded(norm: Callable[[nn.Module], Any], name: str, tmp_path: Path) -> None:
    def network() -> Any:
        return nn.Sequential(nn.Linear(12, 32), norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 32)).eval()

    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = quantize_finely(model, vectors(), em(linear=FINE, em_iterations=40))
    assert {x.name: x.note for x in result.report.layers}["1"].endswith(f"{name} folded into the weight")
    assert type(result.model.get_submodule("1")) is PQLinear
    exact, out = (torch.cat([net(x) for x in vectors()]).detach() for net in (model, result.model))
    assert float((out - exact).norm() / exact.norm()) < 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=network()), vectors())
