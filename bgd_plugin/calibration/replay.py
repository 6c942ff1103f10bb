"""A network's decisions on its data: which boxes it keeps, which branch it takes.

Two networks that decide for themselves soon compute on different things: a detector's second stage, for example, looks
at the regions that its first stage chose. Values of the compressed network then have no counterpart in the float one.
So the float network's decisions are recorded, and the compressed one is made to follow them.

A decision is an operator that makes integers or truth values out of real numbers: comparisons, `argmax`, non-maximum
suppression, rounding to an index. Where positions come with values (`topk`, `sort`, `max`), positions are decided and
the values are the network's own at these positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Decisions", "Recorder", "Replayer"]

_aten: Any = torch.ops.aten
_RANKINGS = frozenset(
    (
        _aten.topk.default,
        _aten.sort.default,
        _aten.sort.stable,
        _aten.max.dim,
        _aten.min.dim,
    )
)
_DROPS_DIMENSION = frozenset((_aten.max.dim, _aten.min.dim))


class Decisions(Protocol):
    """Computes operators, and records or replays decisions."""

    def compute(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """The result of the operator on positional `args` and keyword `kwargs`."""


class Recorder:
    """Records every decision of a run.

    Attributes:
        decisions: the operators that decided, in order, and the tensors of integers or truth values that they gave.
    """

    def __init__(self) -> None:
        self.decisions: list[tuple[Any, list[Tensor]]] = []

    def compute(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Apply the operator to `args` and `kwargs`, and record a decision."""
        result = operator(*args, **kwargs)
        if operator in _RANKINGS:
            self.decisions.append((operator, [result[1].clone()]))
        elif _is_decision(operator, args, kwargs, result):
            self.decisions.append((operator, [t.clone() for t in _tensors(result)]))
        return result


class Replayer:
    """Replays recorded decisions.

    Attributes:
        lost: whether the run has executed other operators than the recorded one; from then on it decides for itself.
    """

    def __init__(self, decisions: list[tuple[Any, list[Tensor]]]) -> None:
        self._decisions = decisions
        self._position = 0
        self.lost = False

    def skip_to(self, position: int) -> None:
        """Go forward to the decision at this position, after a part of the network that did not run."""
        self._position = max(self._position, position)

    def compute(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Apply the operator to `args` and `kwargs`, but return the recorded decision."""
        result = operator(*args, **kwargs)
        if self.lost:
            return result
        if operator in _RANKINGS:
            indices = self._next(operator, [result[1]])
            ranked = None if indices is None else _ranked(operator, args, kwargs, indices[0])
            self.lost = ranked is None
            return result if ranked is None else type(result)(ranked)
        if _is_decision(operator, args, kwargs, result):
            kept = self._next(operator, _tensors(result))
            return result if kept is None else _with_tensors(result, kept)
        return result

    def _next(self, operator: Any, own: list[Tensor]) -> list[Tensor] | None:
        if self._position < len(self._decisions):
            recorded, tensors = self._decisions[self._position]
            if recorded is operator and [t.ndim for t in tensors] == [t.ndim for t in own]:
                self._position += 1
                return [t.clone() for t in tensors]
        self.lost = True
        return None


def _is_decision(operator: Any, args: Any, kwargs: Any, result: Any) -> bool:
    outputs = _tensors(result)
    if not outputs or any(t.is_floating_point() or t.is_complex() for t in outputs) or operator._schema.is_mutable:
        return False
    return any(t.is_floating_point() for t in _tensors((args, kwargs)))


def _ranked(operator: Any, args: Any, kwargs: Any, indices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values of the operator's input at recorded positions; None if there are no such positions."""
    values = args[0]
    if not values.ndim:
        return values.clone(), indices
    dim = _dimension(operator, args, kwargs) % values.ndim
    dropped = operator in _DROPS_DIMENSION and indices.ndim < values.ndim
    places = indices.unsqueeze(dim) if dropped else indices
    across = [[n for i, n in enumerate(t.shape) if i != dim] for t in (values, places)]
    if across[0] != across[1] or (places.numel() and int(places.max()) >= values.shape[dim]):
        return None
    gathered = values.gather(dim, places)
    return gathered.squeeze(dim) if dropped else gathered, indices


def _dimension(operator: Any, args: Any, kwargs: Any) -> int:
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index("dim")
    default = operator._schema.arguments[place].default_value
    value = args[place] if place < len(args) else kwargs.get("dim", default)
    return int(value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    remaining = iter(tensors)
    replace: Callable[[Tensor], Tensor] = lambda _: next(remaining)  # noqa: E731
    return pytree.tree_map_only(Tensor, replace, value)
