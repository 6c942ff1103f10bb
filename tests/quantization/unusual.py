"""Small networks, each out of the ordinary in one way; all of these ways have been seen in real networks."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

__all__ = ["LAYERS", "LAYER_KINDS", "NETWORK_KINDS", "Net", "first_tensor"]

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


# --- what somebody does to one layer


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


# --- what a network's own code does


class CalledTwice(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.tanh(self.body(torch.tanh(self.body(y))))


class FunctionalWeight(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.tanh(F.linear(y, self.body.weight, self.body.bias))


class WeightReadTwice(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.tanh(self.body(y) + (self.body.weight**2).sum(1))


class Matmul(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.body.weight.T)


class Peak(Net):
    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.register_buffer("peak", torch.ones(()))

    def middle(self, y: Tensor) -> Tensor:
        y = super().middle(y)
        self.peak = torch.maximum(self.peak, y.abs().max().detach())
        return y


class Momentum(Net):
    """Its answer depends on what it has seen before."""

    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.register_buffer("past", torch.zeros(16))

    def middle(self, y: Tensor) -> Tensor:
        y = super().middle(y)
        self.past = 0.5 * self.past + 0.5 * y.mean(0).detach()
        return y + self.past


class CountingAttribute(Net):
    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.calls = 0

    def middle(self, y: Tensor) -> Tensor:
        self.calls += 1
        return super().middle(y)


class Marked(Tensor):
    """A tensor that remembers that it is one."""


class TensorSubclass(Net):
    def middle(self, y: Tensor) -> Tensor:
        return super().middle(y.as_subclass(Marked)).as_subclass(Tensor)


class DependsOnData(Net):
    def middle(self, y: Tensor) -> Tensor:
        return super().middle(y) if float(y.abs().max()) > 1e-9 else y


class KeywordOnly(Net):
    def forward(self, x: Tensor, *, scale: float = 1.0, shift: float) -> Any:
        return super().forward(x * scale + shift)


@dataclass
class Answer:
    logits: Tensor
    size: int = 8


class DataclassAnswer(Net):
    def answer(self, y: Tensor) -> Any:
        return Answer(y)


class Pair(NamedTuple):
    logits: Tensor
    size: int


class NamedTupleAnswer(Net):
    def answer(self, y: Tensor) -> Any:
        return Pair(y, 8)


class DictAnswer(Net):
    def answer(self, y: Tensor) -> Any:
        return collections.OrderedDict(logits=y, parts=[y, (y, 1)])


class Dropping(Net):
    def middle(self, y: Tensor) -> Tensor:
        return F.dropout(super().middle(y), 0.5, self.training)


class Autocast(Net):
    def middle(self, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = super().middle(y)
        return y.float()


class WithoutGradient(Net):
    def middle(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return super().middle(y)


class Checkpointed(Net):
    def middle(self, y: Tensor) -> Tensor:
        return checkpoint(super().middle, y, use_reentrant=False)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OwnFunction(Net):
    def middle(self, y: Tensor) -> Tensor:
        return _Straight.apply(super().middle(y))  # type: ignore[no-any-return]


class InPlace(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = self.body(y)
        z = y
        y += 0.5
        F.relu(y, inplace=True)
        return z.tanh_()


class AsksForItsLayers(Net):
    def middle(self, y: Tensor) -> Tensor:
        return super().middle(y) if isinstance(self.body, nn.Linear) else y


class AsksForFeatures(Net):
    def middle(self, y: Tensor) -> Tensor:
        y = super().middle(y.to(self.body.weight.dtype))
        return y * self.body.out_features / self.body.weight.shape[1]


class SumsItsParameters(Net):
    def middle(self, y: Tensor) -> Tensor:
        return super().middle(y) + sum(p.square().mean() for p in self.parameters())


class CallsItsChildren(Net):
    def middle(self, y: Tensor) -> Tensor:
        layers = dict(self.named_children())
        return torch.tanh(layers["body"](y))


class FunctionalCall(Net):
    def middle(self, y: Tensor) -> Tensor:
        state = {"weight": self.body.weight * 0.5, "bias": self.body.bias}
        return torch.tanh(functional_call(self.body, state, (y,)))  # type: ignore[no-any-return]


class Mapped(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.func.vmap(super().middle)(y)  # type: ignore[no-any-return]


class FrozenInConstructor(Net):
    def __init__(self, branches: bool) -> None:
        super().__init__(branches)
        self.table = nn.Parameter(1e4 ** (-torch.arange(16) / 16), requires_grad=False)

    def middle(self, y: Tensor) -> Tensor:
        return super().middle(y * torch.cos(3e3 * self.table))


class NoBatch(Net):
    def middle(self, y: Tensor) -> Tensor:
        return torch.stack([super(NoBatch, self).middle(row) for row in y.unbind()])


NETWORK_KINDS: dict[str, type[Net]] = {
    kind.__name__: kind
    for kind in (
        Net,
        CalledTwice,
        FunctionalWeight,
        WeightReadTwice,
        Matmul,
        Peak,
        Momentum,
        CountingAttribute,
        TensorSubclass,
        DependsOnData,
        KeywordOnly,
        DataclassAnswer,
        NamedTupleAnswer,
        DictAnswer,
        Dropping,
        Autocast,
        WithoutGradient,
        Checkpointed,
        OwnFunction,
        InPlace,
        AsksForItsLayers,
        AsksForFeatures,
        SumsItsParameters,
        CallsItsChildren,
        FunctionalCall,
        Mapped,
        FrozenInConstructor,
        NoBatch,
    )
}
