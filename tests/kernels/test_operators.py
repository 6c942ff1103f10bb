"""The operator that torch.compile meets: its schema, shapes, gradients and results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin.kernels.operators import pq_linear
from bgd_plugin.nn import PQLinear, PQModule, quantized
from bgd_plugin.pq.blocks import decode
from bgd_plugin.pq.masked import masked


def _arguments(has_mask: bool, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    codes = torch.randint(0, 16, (6, 4), dtype=torch.uint8)
    mask = torch.rand(6, 12) > 0.3 if has_mask else None
    bias = torch.randn(6, requires_grad=True) if has_bias else None
    x, codebook = torch.randn(2, 5, 12, requires_grad=True), torch.randn(16, 3, requires_grad=True)
    return x, codebook, codes, mask, bias


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize(("has_mask", "has_bias"), [(False, False), (True, True)])
def test_it_is_a_proper_operator(has_mask: bool, has_bias: bool) -> None:
    torch.library.opcheck(pq_linear, _arguments(has_mask, has_bias))


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_its_gradients_are_those_of_the_plain_path(has_mask: bool, has_bias: bool) -> None:
    x, codebook, codes, mask, bias = _arguments(has_mask, has_bias)
    wanted: list[Any] = [tensor for tensor in (x, codebook, bias) if tensor is not None]
    weight = masked(decode(codebook, codes, (6, 12)), mask)
    expected = torch.autograd.grad(functional.linear(x, weight, bias).sin().sum(), wanted)
    found = torch.autograd.grad(pq_linear(x, codebook, codes, mask, bias).sin().sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_networks_hold_it_in_inference_only() -> None:
    layer = quantized(nn.Linear(32, 12), torch.randn(16, 4), torch.randint(0, 16, (12, 8)))
    assert isinstance(layer, PQLinear)
    assert_compiled_in_inference_only(layer, "bgd_plugin")


def assert_compiled_in_inference_only(layer: PQModule, operator: str) -> None:
    """One graph, without a break; where gradients are needed it holds torch's operators."""
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(2, 32)
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert any(operator in target for target in targets)
    targets.clear()
    compiled(x).sum().backward()
    assert layer.codebook.grad is not None
    assert not any(operator in target for target in targets)
