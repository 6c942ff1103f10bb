"""When a layer goes through the kernels, and when it does not."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bgd_plugin as bgd
from bgd_plugin import kernels
from bgd_plugin.jit import switch
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.jit.nearest import search
from bgd_plugin.kernels import operators
from bgd_plugin.kernels import switch as switch_of_layers
from bgd_plugin.nn import PQLinear, quantized


def layer(dtype: torch.dtype = torch.float32) -> PQLinear:
    found = quantized(nn.Linear(32, 12), torch.randn(16, 4), torch.randint(0, 16, (12, 8)))
    assert isinstance(found, PQLinear)
    return found.to(dtype).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that went through a kernel."""
    seen: list[Tensor] = []
    run: Callable[..., Tensor] = operators.lookup_linear

    def watched(x: Tensor, *others: Any) -> Tensor:
        seen.append(x)
        return run(x, *others)

    monkeypatch.setattr(operators, "lookup_linear", watched)
    return seen


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inference_uses_them(context: Any, dtype: torch.dtype, calls: list[Tensor]) -> None:
    with context():
        layer(dtype)(torch.randn(2, 32, dtype=dtype))
    assert len(calls) == 1


def test_so_does_a_layer_whose_parameters_are_frozen(calls: list[Tensor]) -> None:
    layer().requires_grad_(False)(torch.randn(2, 32))
    assert len(calls) == 1


class _Watching(TorchDispatchMode):
    """Counts the products that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += "addmm" in str(func)
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    """A tensor that is more than a tensor."""


def test_inference_without_no_grad_uses_them_and_keeps_its_gradients(calls: list[Tensor]) -> None:
    found = layer()
    x = torch.randn(2, 32, requires_grad=True)
    output = found(x)
    assert len(calls) == 1
    (output.square().sum()).backward()
    gradients = x.grad, found.codebook.grad, found.bias.grad
    x.grad = found.codebook.grad = found.bias.grad = None
    with kernels.disabled():
        plain = found(x)
    plain.square().sum().backward()
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, (x.grad, found.codebook.grad, found.bias.grad), strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_gradients_of_gradients_are_those_of_the_plain_path() -> None:
    found = layer()
    x = torch.randn(2, 32, requires_grad=True)
    seconds = []
    for context in (torch.enable_grad(), kernels.disabled()):
        with context:
            (first,) = torch.autograd.grad(found(x).pow(3).sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), found.codebook)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-3)


def test_training_does_not(calls: list[Tensor]) -> None:
    found = layer().train()
    found(torch.randn(2, 32)).sum().backward()
    assert found.codebook.grad is not None
    frozen = layer().train().requires_grad_(False)
    x = torch.randn(2, 32, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None and not calls


@torch.no_grad()
def test_neither_does_what_stands_outside_plain_inference(calls: list[Tensor]) -> None:
    found, x = layer(), torch.randn(2, 32)
    contexts: list[AbstractContextManager[Any]] = [torch.autocast("cpu"), kernels.disabled()]
    for context in contexts:
        with context:
            found(x)
    watching = _Watching()
    with watching:
        found(x)
    assert watching.products == 1
    torch.func.vmap(found)(torch.randn(3, 2, 32))
    found(x.as_subclass(_Subclass))
    layer(torch.float64)(x.double())
    assert not calls


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:FutureWarning")
@torch.no_grad()
def test_traces_and_exports_hold_torchs_operators(calls: list[Tensor]) -> None:
    found, x = nn.Sequential(layer()).eval(), torch.randn(2, 32)
    traced = fx.symbolic_trace(found)
    exports = [torch.export.export(found, (x,)), torch.export.export(found, (x,), strict=True)]
    graphs = [traced.graph, *(program.graph for program in exports)]
    assert not any("bgd_plugin" in str(node.target) for graph in graphs for node in graph.nodes)
    assert torch.jit.trace(found, x, check_trace=False).inlined_graph.findNode("aten::linear") is not None
    assert not calls


def test_the_context_ends_and_nests(calls: list[Tensor]) -> None:
    assert kernels.enabled()
    with kernels.disabled(), kernels.disabled():
        assert not kernels.enabled()
    assert kernels.enabled()


@pytest.mark.parametrize(("value", "expected"), [("Off", False), ("0", False), ("on", True), (None, True)])
def test_the_environment_switches_them_off(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BGD_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("BGD_KERNELS", value)
    imported_anew = runpy.run_path(switch.__file__)
    assert imported_anew["enabled"]() == (expected and AVAILABLE)


def test_without_llvmlite_the_plain_path_remains() -> None:
    """As on a machine without the extra `fast`: nothing fails, and nothing of llvmlite is imported."""
    code = """
import sys
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "llvmlite" else find(name, *rest)
import torch
from torch import nn
from bgd_plugin import kernels
from bgd_plugin.kernels.operators import pq_linear
from bgd_plugin.nn import quantized
layer = quantized(nn.Linear(32, 12), torch.randn(16, 4), torch.randint(0, 16, (12, 8)))
x = torch.randn(2, 32)
with torch.no_grad():
    same = torch.equal(layer(x), pq_linear(x, layer.codebook, layer.codes, None, layer.bias))
print(kernels.enabled(), same, "llvmlite" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


@pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")
def test_quantize_runs_its_layers_plainly_and_searches_by_compiled_code(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Tensor] = []
    monkeypatch.setattr("bgd_plugin.pq.feedback.search", lambda *given: searched.append(given[0]) or search(*given))
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    config = bgd.BGDConfig(linear=bgd.LayerConfig(block_size=4, codebook_size=8))
    result = bgd.quantize(network, [torch.randn(32, 8)], config, progress=False)
    assert searched
    assert not calls
    with torch.no_grad():
        result.model(torch.randn(3, 8))
    assert calls


def test_plain_layers_nest_and_end(calls: list[Tensor]) -> None:
    with switch_of_layers.plain_layers():
        with switch_of_layers.plain_layers():
            assert switch_of_layers.plain_path()
        assert switch_of_layers.plain_path()
        assert kernels.enabled() == AVAILABLE
        layer()(torch.randn(2, 32))
    assert not switch_of_layers.plain_path()
    assert not calls
