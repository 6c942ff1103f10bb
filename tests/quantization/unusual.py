"""Small networks, each out of the ordinary in one way; all of these ways have been seen in real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

__all__ = ["LAYERS", "LAYER_KINDS", "Net", "first_tensor"]


LAYERS = ("conv", "gate", "body", "out")


class Net(nn.Module):
    """A convolution, a norm, a gate, two linear layers; with `branches` it does not trace."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.gate = nn.Conv2d(16, 16, 1)
        self.body, self.out = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        y = (y * torch.sigmoid(self.gate(y))).mean((2, 3))
        y = self.middle(y)
        if self.branches and y.sum() > 1e9:
            y = -y
        return self.answer(self.out(y))

    def middle(self, y: Tensor) -> Tensor:
        return torch.tanh(self.body(y))

    def answer(self, y: Tensor) -> Any:
        return y


def first_tensor(output: Any) -> Tensor:
    """The tensor in an answer of any of these networks."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return first_tensor(next(iter(output.values())))
    return first_tensor(output[0] if isinstance(output, (tuple, list)) else output.logits)


def _patched(layer: Any) -> Any:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2
    return layer


def _patched_before(layer: Any) -> Any:
    forward = layer.forward
    layer.forward = lambda x: forward(x * 0.5)
    return layer


def _hook_after(layer: Any) -> Any:
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


def _hook_before(layer: Any) -> Any:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 3, *args[1:]))
    return layer


def _hook_before_by_name(layer: Any) -> Any:
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    return layer


def _hook_that_keeps(layer: Any) -> Any:
    layer.kept = {}
    layer.register_forward_hook(lambda module, args, output: layer.kept.__setitem__("x", output))
    return layer


def _counting_hook(layer: Any) -> Any:
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "count", getattr(module, "count", 0) + 1))
    return layer


def _changed(layer: Any, content: dict[str, Any]) -> Any:
    """The layer, of a subclass of its class."""
    layer.__class__ = type(f"Own{type(layer).__name__}", (type(layer),), {"__module__": __name__, **content})
    return layer


def _subclass(layer: Any) -> Any:
    base = type(layer)
    return _changed(layer, {"forward": lambda self, x: 2 * base.forward(self, x)})


def _subclass_conv_forward(layer: Any) -> Any:
    if not isinstance(layer, nn.Conv2d):
        return _subclass(layer)

    def centred(self: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, weight - weight.mean((1, 2, 3), keepdim=True) + 0.1, bias)

    return _changed(layer, {"_conv_forward": centred})


def _subclass_with_attributes(layer: Any) -> Any:
    base = type(layer)
    layer = _changed(layer, {"gain": property(lambda self: self.scale + 1)})
    layer.scale = torch.tensor(2.0)
    layer.register_forward_hook(lambda module, args, output: output * module.gain)
    assert base in type(layer).__mro__
    return layer


def _subclass_counting(layer: Any) -> Any:
    base = type(layer)

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return base.forward(self, x)  # type: ignore[no-any-return]

    layer.register_buffer("calls", torch.zeros((), dtype=torch.long))
    return _changed(layer, {"forward": forward})


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def _parametrized(layer: Any) -> Any:
    parametrize.register_parametrization(layer, "weight", _Half())
    return layer


def _scaled_in_forward(layer: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm()
        return F.conv2d(x, weight, self.bias) if weight.ndim == 4 else F.linear(x, weight, self.bias)

    return _changed(layer, {"forward": forward})


LAYER_KINDS: dict[str, Callable[[Any], Any]] = {
    "patched": _patched,
    "patched before": _patched_before,
    "hook after": _hook_after,
    "hook before": _hook_before,
    "hook before by name": _hook_before_by_name,
    "hook that keeps": _hook_that_keeps,
    "counting hook": _counting_hook,
    "subclass": _subclass,
    "subclass with _conv_forward": _subclass_conv_forward,
    "subclass with attributes": _subclass_with_attributes,
    "subclass that counts": _subclass_counting,
    "parametrized": _parametrized,
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": lambda layer: _old_weight_norm(layer),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hook": nn.utils.spectral_norm,
    "weight scaled in forward": _scaled_in_forward,
}


def _old_weight_norm(layer: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)
