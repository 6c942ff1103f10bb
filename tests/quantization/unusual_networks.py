"""What a network's own code does, and a trace may miss."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.quantization.unusual import Net


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
