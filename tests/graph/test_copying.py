"""Copies of networks: whatever a network holds, running or changing the copy does not reach the original."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import copy_module
from tests.networks import vectors


def _lambda(layer: Any) -> Callable[..., Tensor]:
    forward = layer.forward
    return lambda x: 2 * forward(x)


def _default(layer: Any) -> Callable[..., Tensor]:
    return lambda x, forward=layer.forward: 2 * forward(x)


def _nested(layer: Any) -> Callable[..., Tensor]:
    def outer(x: Tensor) -> Tensor:
        return inner(x) * 2

    def inner(x: Tensor) -> Tensor:
        return layer.weight.sum() * 0 + nn.functional.linear(x, layer.weight, layer.bias)

    return outer


def _partial(layer: Any) -> Callable[..., Tensor]:
    return functools.partial(lambda module, x: 2 * nn.functional.linear(x, module.weight, module.bias), layer)


def _method(layer: Any) -> Callable[..., Tensor]:
    return types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias), layer)


PATCHES = {"lambda": _lambda, "default": _default, "nested": _nested, "partial": _partial, "method": _method}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_forward_computes_with_the_copys_weights(patch: str, share: bool) -> None:
    model, (x,) = nn.Sequential(nn.Linear(12, 8)), vectors(1)
    model[0].forward = PATCHES[patch](model[0])  # type: ignore[method-assign]
    wanted = model(x)
    duplicate = copy_module(model, share_tensors=share)
    assert torch.equal(duplicate(x), wanted)
    duplicate[0].weight = nn.Parameter(torch.zeros(8, 12))
    duplicate[0].bias = nn.Parameter(torch.zeros(8))
    assert not duplicate(x).any()
    assert torch.equal(model(x), wanted)


def test_a_hook_that_closes_over_the_network_writes_into_the_copy() -> None:
    model, (x,) = nn.Sequential(nn.Linear(12, 8)), vectors(1)
    model.kept = {}
    model[0].register_forward_hook(lambda module, args, output: model.kept.__setitem__("0", output))  # type: ignore[operator]
    model(x)
    duplicate = copy_module(model)
    model.kept.clear()  # type: ignore[operator]
    duplicate(x)
    assert not model.kept
    assert set(duplicate.kept) == {"0"}


def test_a_function_that_closes_over_nothing_of_the_network_is_shared() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(12, 8))
    hook = lambda *_: seen.append(1)  # noqa: E731
    model[0].register_forward_hook(hook)
    copied = copy_module(model)
    assert list(copied[0]._forward_hooks.values()) == [hook]


def test_tensors_with_a_history_are_copied_wherever_they_are() -> None:
    model, (x,) = nn.Sequential(nn.Linear(12, 8)), vectors(1)
    model.deep = {"a": [(model(x), 1)]}
    value = copy_module(model).deep["a"][0][0]
    assert torch.equal(value, model.deep["a"][0][0])  # type: ignore[index]
    assert value.grad_fn is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [(threading.Lock, "lock"), (lambda: Path(__file__).open(), "TextIOWrapper")],  # noqa: SIM115 (closed below)
)
@pytest.mark.parametrize("call", [bgd.plan, copy_module, bgd.quantize_weights])
def test_what_cannot_be_copied_is_named(value: Callable[[], Any], kind: str, call: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 8)))
    held = value()
    model[0].held = [held]
    with pytest.raises(ConfigError, match=r"attribute '0\.held' of the network, a list, cannot be copied .*" + kind):
        call(model)
    if hasattr(held, "close"):
        held.close()


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("layer", [lambda: nn.LazyLinear(8), lambda: nn.LazyBatchNorm1d()])
def test_lazy_layers_that_have_never_run_are_named(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(12, 8), layer())
    for call in (bgd.plan, lambda m: bgd.quantize(m, vectors(), bgd.BGDConfig(max_divergence=None), progress=False)):
        with pytest.raises(ConfigError, match=r"lazy layers .*'1' \(Lazy.*run the network once"):
            call(model)


def test_a_graph_keeps_its_attributes_and_hooks() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(12, 8)))
    model.names = ("cat", "dog")
    model.register_forward_hook(lambda *_: None)
    model.register_buffer("table", torch.zeros(3), persistent=False)
    copied = copy_module(model)
    assert copied.names == ("cat", "dog")
    assert len(copied._forward_hooks) == 1
    assert "table" not in copied.state_dict()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_with_parts_of_its_own_is_copied() -> None:
    part = torch.jit.script(nn.Sequential(nn.Linear(12, 12), nn.Tanh()))
    model, (x,) = nn.Sequential(part, nn.Linear(12, 8)), vectors(1)
    assert torch.equal(copy_module(model)(x), model(x))
