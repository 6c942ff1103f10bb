"""A bias that something else uses, too, is not shifted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.graph import find_layers, trace
from tests.networks import em, same_outputs, vectors


class _Net(nn.Module):
    def __init__(self, change: Callable[[Any], None], branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm: nn.Module = nn.Identity()
        change(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.branches and x.sum() > 1e9:
            x = -x
        return self.c(self.norm(torch.tanh(self.b(x))))


def _nothing(net: Any) -> None:
    pass


def _bias(net: Any) -> None:
    net.c.bias = net.b.bias


def _bias_of_a_norm(net: Any) -> None:
    net.norm = nn.LayerNorm(16)
    net.norm.bias = net.c.bias


def _layer(net: Any) -> None:
    net.b.weight, net.b.bias = net.c.weight, net.c.bias


def _module(net: Any) -> None:
    net.b = net.c


SHARED: dict[Any, set[str]] = {
    _nothing: {"b", "c"},
    _bias: set(),
    _bias_of_a_norm: {"b"},
    _layer: {"b"},
    _module: {"b"},
}


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
@pytest.mark.parametrize("share", SHARED)
def test_a_shared_bias_stays_what_it_is_and_the_file_gives_the_network_back(
    share: Callable[[Any], None], branches: bool, tmp_path: Path
) -> None:
    model, data = _Net(share, branches).eval(), vectors()
    config = em(method="full", linear=bgd.LayerConfig(block_size=4, codebook_size=4))
    found: Any = bgd.quantize(model, data, config, progress=False).model
    shifted = {name for name in "bc" if not torch.equal(found.get_submodule(name).bias, model.get_submodule(name).bias)}
    assert shifted <= SHARED[share] | ({"c"} if share in (_layer, _module) else set())
    if share in (_bias, _bias_of_a_norm):
        assert torch.equal(found.c.bias, model.c.bias)
    if share is _nothing:
        assert shifted
    assert (found.b.bias is found.c.bias) == (model.b.bias is model.c.bias)
    bgd.save(found, tmp_path / "net")
    assert same_outputs(found, bgd.load(tmp_path / "net", like=_Net(share, branches).eval()), data)


class _Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + self.b.bias)


def test_a_bias_that_the_graph_reads_besides_is_not_its_layers_own() -> None:
    found, _ = find_layers(trace(_Reads().eval()))
    assert {layer.name: layer.bias for layer in found} == {"a": "a.bias", "b": None}


def test_a_file_whose_biases_differ_gives_them_to_a_network_in_which_they_are_one(tmp_path: Path) -> None:
    apart = bgd.quantize(_Net(_nothing, branches=False).eval(), vectors(), em(), progress=False).model
    bgd.save(apart, tmp_path / "net")
    loaded: Any = bgd.load(tmp_path / "net", like=_Net(_bias, branches=False).eval())
    assert same_outputs(apart, loaded, vectors())
    assert loaded.b.bias is not loaded.c.bias
