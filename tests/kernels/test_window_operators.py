"""The operators of trellis windows that torch.compile meets: schema, shapes, gradients and results."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin.kernels.window_operators import window_decode, window_linear
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.windows import decode_windows
from tests.kernels.test_operators import assert_compiled_in_inference_only
from tests.kernels.window_layers import scale_and_codes, window_layer


def _arguments(has_mask: bool, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    scale, codes = scale_and_codes(6, 12)
    mask = torch.rand(6, 12) > 0.3 if has_mask else None
    bias = torch.randn(6, requires_grad=True) if has_bias else None
    return torch.randn(2, 5, 12, requires_grad=True), scale.requires_grad_(), codes, mask, bias


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize(("has_mask", "has_bias"), [(False, False), (True, True)])
def test_they_are_proper_operators(has_mask: bool, has_bias: bool) -> None:
    _, scale, codes, *_ = arguments = _arguments(has_mask, has_bias)
    torch.library.opcheck(window_linear, arguments)
    torch.library.opcheck(window_decode, (scale, codes))


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_their_gradients_are_those_of_the_plain_path(has_mask: bool, has_bias: bool) -> None:
    x, scale, codes, mask, bias = _arguments(has_mask, has_bias)
    wanted: list[Any] = [tensor for tensor in (x, scale, bias) if tensor is not None]
    weight = masked(decode_windows(scale, codes), mask)
    expected = torch.autograd.grad(functional.linear(x, weight, bias).sin().sum(), wanted)
    found = torch.autograd.grad(window_linear(x, scale, codes, mask, bias).sin().sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    (one,) = torch.autograd.grad(window_decode(scale, codes).sin().sum(), scale)
    (other,) = torch.autograd.grad(decode_windows(scale, codes).sin().sum(), scale)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_networks_hold_them_in_inference_only() -> None:
    assert_compiled_in_inference_only(window_layer(nn.Linear(32, 24)).train(), "bgd_plugin.window_")


def test_without_llvmlite_the_plain_path_remains() -> None:
    """As on a machine without the extra `fast`: the operator computes the same, and nothing of llvmlite is imported."""
    code = """
import sys
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "llvmlite" else find(name, *rest)
import torch
from torch import nn
from bgd_plugin.kernels.window_operators import window_decode, window_linear
from tests.kernels.window_layers import window_layer
layer = window_layer(nn.Linear(32, 24))
x = torch.randn(2, 32)
with torch.no_grad():
    same = torch.equal(layer(x), window_linear(x, layer.codebook, layer.codes, None, layer.bias))
    same &= torch.equal(layer.weight, window_decode(layer.codebook, layer.codes))
print(same, "llvmlite" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
