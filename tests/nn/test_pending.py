"""Weights that a class's own code reads: not decoded where it convolves with them, on several threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bgd_plugin.graph.computed import compute_parameter_
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.jit.switch import _is_off
from bgd_plugin.nn import FloatWeight, pending, quantized
from bgd_plugin.nn.pending import PendingWeight

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")


class Own(nn.Conv2d):
    """A convolution whose code reads its weight, as those of EfficientNet with static padding do."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Code that does more with the weight than to convolve with it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        rows = weight.flatten(1)
        scaled = (weight - rows.mean(1).view(-1, 1, 1, 1)) / rows.std(1).view(-1, 1, 1, 1)
        self.seen = weight.shape, weight.dtype, weight.is_contiguous(), weight.numel(), copy_of(weight)
        return functional.conv2d(input, scaled, self.bias, padding=self.padding)


class Changed(nn.Conv2d):
    """Code that changes what it has read."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.mul_(2)
        return functional.conv2d(input, self.weight, self.bias)


def copy_of(weight: Tensor) -> Tensor:
    return torch.stack([weight, weight])[0]


def layer(kind: Any, *sizes: int, **options: Any) -> Any:
    module = kind(*sizes, **options)
    holder = FloatWeight(module.weight)
    columns = module.weight[0].numel()
    block = 9 if columns % 9 == 0 else 4
    codes = torch.randint(0, 256, (len(module.weight), columns // block))
    compute_parameter_(module, "weight", quantized(holder, torch.randn(256, block), codes))
    return module.eval()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> Any:
    """The kernels run on two threads; a list of the weights that were not decoded when they were read."""
    token = _is_off.set(False)
    found: list[Tensor] = []

    def watched(source: Any) -> Tensor | None:
        own = pending.pending(source)
        found.extend([] if own is None else [own])
        return own

    monkeypatch.setattr("bgd_plugin.nn.weight.pending", watched)
    yield found
    _is_off.reset(token)


def agrees(module: Any, x: Tensor) -> Tensor:
    """The output, which is that of the plain path up to rounding, of torch's own type and in torch's order."""
    found = module(x)
    token = _is_off.set(True)
    expected = module(x)
    _is_off.reset(token)
    assert type(found) is Tensor and found.stride() == expected.stride()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return expected  # type: ignore[no-any-return]


def is_untouched(weight: Tensor) -> bool:
    return vars(weight)["decoded"] is None


@pytest.mark.parametrize(
    ("sizes", "options", "shape", "is_fast"),
    [
        ((96, 24, 1), {}, (1, 96, 40, 40), True),
        ((96, 24, 1), {"bias": False}, (2, 96, 5, 5), True),
        ((96, 24, 1), {"stride": 2}, (1, 96, 10, 10), False),
        ((96, 24, 1), {"padding": 1}, (1, 96, 10, 10), False),
        ((128, 256, 3), {"padding": (1, 1)}, (1, 128, 7, 7), True),
        ((128, 256, 3), {"padding": "same"}, (1, 128, 7, 7), False),
        ((36, 36, 3), {"groups": 2}, (1, 36, 7, 7), False),
    ],
)
@torch.no_grad()
def test_a_convolution_uses_the_codes_where_that_is_faster(
    made: list[Tensor], sizes: Any, options: dict[str, Any], shape: Any, is_fast: bool
) -> None:
    order = torch.channels_last if sizes[2] == 1 else torch.contiguous_format
    module, x = layer(Own, *sizes, **options), torch.randn(shape).to(memory_format=order)
    agrees(module, x)
    assert len(made) == 1 and type(made[0]) is PendingWeight
    assert is_untouched(made[0]) == is_fast


@torch.no_grad()
def test_whatever_else_is_done_with_it_is_done_with_the_decoded_weight(made: list[Tensor]) -> None:
    module = layer(Standardized, 12, 16, 3, padding=1)
    agrees(module, torch.randn(2, 12, 5, 5))
    assert len(made) == 1 and not is_untouched(made[0])
    shape, dtype, is_contiguous, count, copied = module.seen
    assert (tuple(shape), dtype, is_contiguous, count) == ((16, 12, 3, 3), torch.float32, True, 1728)
    assert torch.equal(copied, module.weight)
    assert type(repr(made[0])) is str and type(made[0].clone()) is Tensor


@torch.no_grad()
def test_a_change_in_place_is_kept(made: list[Tensor]) -> None:
    agrees(layer(Changed, 96, 24, 1), torch.randn(1, 96, 5, 5))
    assert len(made) == 1


def test_gradients_of_the_input_are_those_of_the_plain_path(made: list[Tensor]) -> None:
    module, x = layer(Own, 96, 24, 1).requires_grad_(False), torch.randn(1, 96, 5, 5, requires_grad=True)
    found = torch.autograd.grad(module(x).square().sum(), x)[0]
    weight = module.weight
    expected = torch.autograd.grad(functional.conv2d(x, weight, module.bias).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)
    module.requires_grad_(True)
    made.clear()
    module(x)
    assert not made


@torch.no_grad()
def test_it_is_decoded_on_one_thread_outside_the_call_with_hooks_and_in_traces(made: list[Tensor]) -> None:
    module, x = layer(Own, 96, 24, 1), torch.randn(1, 96, 5, 5)
    assert type(module.weight) is Tensor
    torch.set_num_threads(1)
    module(x)
    torch.set_num_threads(2)
    traced = fx.symbolic_trace(nn.Sequential(module))
    assert not any(isinstance(value, PendingWeight) for value in vars(traced).values())
    module._modules["weight"].register_forward_hook(lambda *_: None)
    module(x)
    assert not made
