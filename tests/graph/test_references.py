"""What a network holds of its layers and tensors beside its own tables follows when they are replaced."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.graph import copy_module, references
from tests.networks import em, same_outputs, vectors


class _Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layers = {"one": [layer]}

    def __call__(self, x: Tensor) -> Any:
        return self.layers["one"][0](x)


class _Net(nn.Module):
    """Its middle layer is called through what `hold` makes of it."""

    def __init__(self, hold: Callable[[Any], Any], branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.held = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.branches and x.sum() > 1e9:
            x = -x
        return self.c(torch.tanh(self.middle(x)))

    def middle(self, x: Tensor) -> Any:
        held = self.held
        while not callable(held) or isinstance(held, weakref.ref):
            held = held() if isinstance(held, weakref.ref) else held["x"] if isinstance(held, dict) else held[0]
        return held(x)


def _closure(net: Any) -> Any:
    layer = net.b
    return lambda x: layer(x)


MODULES: dict[str, Callable[[Any], Any]] = {
    "list": lambda net: [net.b],
    "tuple in a dict": lambda net: {"x": (net.b,)},
    "closure": _closure,
    "closures in a list": lambda net: [_closure(net)],
    "partial": lambda net: functools.partial(lambda layer, x: layer(x), net.b),
    "method": lambda net: net.b.forward,
    "weak reference": lambda net: weakref.ref(net.b),
    "object": lambda net: _Holder(net.b),
}


def _built(hold: Callable[[Any], Any], branches: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    return _Net(hold, branches).eval()


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
@pytest.mark.parametrize("held", MODULES)
def test_a_layer_that_is_held_elsewhere_is_quantized_there_too(held: str, branches: bool, tmp_path: Path) -> None:
    model, data = _built(MODULES[held], branches, 0), vectors()
    coarse = bgd.LayerConfig(block_size=4, codebook_size=4)
    result = bgd.quantize(model, data, em(linear=coarse), progress=False)
    assert "b" in {layer.name for layer in result.report.layers}
    with torch.no_grad():
        layers: Any = result.model
        for x in data:
            wanted = layers.c(torch.tanh(layers.b(torch.tanh(layers.a(x)))))
            assert torch.equal(result.model(x), wanted)
            assert not torch.allclose(model(x), wanted, atol=1e-3)
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=_built(MODULES[held], branches, 1)), data)
    assert same_outputs(bgd.materialize(result.model), result.model, data)


@pytest.mark.parametrize("held", MODULES)
def test_a_copy_is_held_by_its_own_network(held: str) -> None:
    model = _built(MODULES[held], branches=False, seed=0)
    copied = copy_module(model)
    with torch.no_grad():
        copied.b.weight.zero_()
        copied.b.bias.zero_()
        x = vectors(1)[0]
        assert torch.equal(copied(x), copied.c(torch.zeros(8, 16)))
        assert not torch.equal(model(x), copied(x))


class _Tensors(_Net):
    """Reads the weight and the bias of its middle layer out of a list."""

    def middle(self, x: Tensor) -> Any:
        return F.linear(x, *self.held)


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
def test_a_weight_that_is_held_elsewhere_stays_float(branches: bool, tmp_path: Path) -> None:
    def built(seed: int) -> Any:
        torch.manual_seed(seed)
        return _Tensors(lambda net: [net.b.weight, net.b.bias], branches).eval()

    model, data = built(0), vectors()
    result = bgd.quantize(model, data, em(), progress=False)
    assert [layer.name for layer in result.report.layers] == ["c"]
    assert {s.name: s.reason for s in result.report.skipped}["b"].startswith("the network's code keeps its weight")
    found: Any = result.model
    assert found.held[0] is found.b.weight
    bgd.save(found, tmp_path / "net")
    loaded: Any = bgd.load(tmp_path / "net", like=built(1))
    assert loaded.held[0] is loaded.b.weight
    assert same_outputs(found, loaded, data)


class _Outside(_Net):
    def middle(self, x: Tensor) -> Any:
        return self.b(self.held[0]["x"](x))


def test_layers_that_are_no_part_of_the_network_are_refused_where_they_differ(tmp_path: Path) -> None:
    def built(seed: int) -> Any:
        torch.manual_seed(seed)
        return _Outside(lambda net: [{"x": nn.Linear(16, 16)}], branches=False).eval()

    data = vectors()
    found = bgd.quantize(built(0), data, em(), progress=False).model
    bgd.save(found, tmp_path / "net")
    assert same_outputs(found, bgd.load(tmp_path / "net", like=built(0)), data)
    with pytest.raises(bgd.errors.CheckpointError, match=r"held\[0\]\[x\]\[weight\].*fingerprint"):
        bgd.load(tmp_path / "net", like=built(1))


class _Settings:
    """What several modules share: found at the end of the way that is searched, and again, nearer."""

    def __init__(self, layer: nn.Module) -> None:
        self.own = [layer]


def test_what_several_modules_share_follows_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked through once, and again where it is nearer; a tuple is made anew for each."""
    old, new = nn.Linear(3, 3), nn.Linear(3, 3)
    settings, pair = _Settings(old), (old, "x")
    first, second, third = nn.Module(), nn.Module(), nn.Module()
    first.held, first.pair = [[[[settings]]]], pair
    second.held, second.pair = [settings], pair
    third.held, third.pair = settings, pair
    looked: list[Any] = []
    held = references._held
    monkeypatch.setattr(references, "_held", lambda value: [looked.append(value), held(value)][1])
    references.redirect_(nn.ModuleList([first, second, third]), {id(old): new})
    assert settings.own[0] is new
    assert all(module.pair[0] is new for module in (first, second, third))
    assert pair[0] is old
    assert sum(value is settings for value in looked) == 3
    looked.clear()
    references.redirect_(nn.ModuleList([third, second, first]), {id(new): old})
    assert settings.own[0] is old and sum(value is settings for value in looked) == 1
