"""Observe which layers of a network run, and on which inputs, without changing its code.

The observer stands below modules and functions, at torch's operators: a layer is recognised by the memory of its
weight, however its code is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bgd_plugin.calibration.replay import Decisions
from bgd_plugin.graph import pointwise
from bgd_plugin.pq.blocks import Geometry

__all__ = ["Stop", "Watch"]

_aten: Any = torch.ops.aten
_CONVOLUTIONS = (_aten.convolution.default,)
# operator → where its two matrices stand among the arguments
_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.linear.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}

_GROUPED = ("grouped_mm", "grouped_mm_fallback")

OnCall = Callable[[str, Tensor, Geometry | None], None]


class Stop(BaseException):
    """Ends a run early; not an Exception, so that the network's own handlers do not catch it."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A weight's range in its memory, and the number of weights in one of its matrices."""

    name: str
    start: int
    end: int
    matrix: int


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `on_call(name, input, geometry)` before each operator that computes with a watched weight.

    An embedding, which looks up rows, has no geometry.

    Args:
        weights: the watched weights by name; a view of one is recognised, too.
        on_call: called with the layer's name, the input, and the geometry of the call.
        decisions: records or replays the network's decisions.
    """

    def __init__(self, weights: Mapping[str, Tensor], on_call: OnCall, decisions: Decisions | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: dict[int, list[_Place]] = {}
        for name, weight in weights.items():
            start, matrix = int(weight.storage_offset()), math.prod(weight.shape[-2:])
            place = _Place(name=name, start=start, end=start + weight.numel(), matrix=matrix)
            self._places.setdefault(_memory(weight), []).append(place)
        self._on_call = on_call
        self._decisions = decisions
        self._gathered: dict[int, tuple[str, Tensor, Tensor]] = {}

    def __enter__(self) -> Watch:
        """Begin; attention that runs as a single operator would hide its layers, so torch must take it apart."""
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """End, and let torch compute as before."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fast_path)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator, then compute it."""
        if operator in _CONVOLUTIONS:
            self._see_convolution(*args)
        elif operator in _PRODUCTS:
            self._see_product(*(args[place] for place in _PRODUCTS[operator]))
        elif operator is _aten.embedding.default and (place := self._place(args[0])) is not None:
            self._on_call(place.name, args[1], None)
        elif operator._schema.name.endswith(_GROUPED):
            self._see_grouped_product(*args[:3])
        elif operator is _aten.mkldnn_rnn_layer.default:
            self._see_recurrence(args[0], args[1])
        result = self._computed(operator, args, kwargs or {})
        if operator is _aten.mkldnn_rnn_layer.default:
            self._see_states(result[0], args[2], args[5], reverse=args[7])
        elif operator is _aten.index.Tensor and len(args[1]) == 1 and (place := self._place(args[0])) is not None:
            self._gathered[_memory(result)] = (place.name, args[1][0], result)
        return result

    def _computed(self, operator: Any, args: Any, kwargs: Any) -> Any:
        if self._decisions is None:
            return operator(*args, **kwargs)
        return self._decisions.compute(operator, args, kwargs)

    def _place(self, weight: Tensor) -> _Place | None:
        found = self._places.get(_memory(weight), ()) if weight.numel() else ()
        offset = int(weight.storage_offset()) if found else 0
        return next((place for place in found if place.start <= offset < place.end), None)

    def _see_convolution(self, x: Tensor, weight: Tensor, bias: Any, *arguments: Any) -> None:
        place = self._place(weight)
        if place is not None:
            stride, padding, dilation, is_transposed, _, groups = arguments
            kernel = tuple(weight.shape[2:])
            plain = Geometry.of(kernel, stride, padding, dilation, groups)
            self._on_call(place.name, x, pointwise(len(kernel), groups) if is_transposed else plain)

    def _see_product(self, x: Tensor, weight: Tensor) -> None:
        place = self._place(weight)
        if place is not None:
            member = (int(weight.storage_offset()) - place.start) // place.matrix
            self._on_call(place.name, x, Geometry.linear(member))
        elif _memory(weight) in self._gathered and x.ndim == 3:
            name, members, _ = self._gathered[_memory(weight)]
            for member in sorted(set(members.tolist())):
                self._on_call(name, x[members == member].flatten(0, 1), Geometry.linear(member))

    def _see_grouped_product(self, x: Tensor, weight: Tensor, ends: Tensor) -> None:
        """Rows of x are sorted by the matrix that multiplies them; `ends` says where the rows of each matrix end."""
        place = self._place(weight)
        if place is not None and x.ndim == 2 and weight.ndim == 3:
            bounds = [0, *ends.tolist()]
            for member, (start, end) in enumerate(itertools.pairwise(bounds)):
                if end > start:
                    self._on_call(place.name, x[start:end], Geometry.linear(member))

    def _see_recurrence(self, x: Tensor, weight: Tensor) -> None:
        """A whole layer of an LSTM in one operator: its inputs `[time, batch, features]`."""
        place = self._place(weight)
        if place is not None:
            self._on_call(place.name, x, Geometry.linear())

    def _see_states(self, states: Tensor, weight: Tensor, first: Tensor, *, reverse: bool) -> None:
        """Its states `[time, batch, features]`, each the input of the step after it, beginning with the first."""
        place = self._place(weight)
        if place is not None:
            first = first.reshape(1, *states.shape[1:])
            given = (states[1:], first) if reverse else (first, states[:-1])
            self._on_call(place.name, torch.cat(given), Geometry.linear())


def _memory(weight: Tensor) -> int:
    return int(weight.untyped_storage().data_ptr())
