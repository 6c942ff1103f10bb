"""See which layers run, and on what, while a network or a part of it runs as it is.

Watching is done below modules and functions, on the operators of torch: a layer is recognised by the memory of its
weight, however its code is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bgd_plugin.calibration.replay import Decisions
from bgd_plugin.graph import pointwise
from bgd_plugin.pq.blocks import Geometry

__all__ = ["Stop", "Watch", "weight_key"]

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

OnCall = Callable[[str, Tensor, Geometry | None], None]


class Stop(BaseException):
    """Ends a run that has shown what was wanted; not an Exception, so that the network's own code lets it pass."""


def weight_key(weight: Tensor) -> int:
    """What a weight has in common with every view on it."""
    return int(weight.untyped_storage().data_ptr())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `on_call(name, input, geometry)` before each operator that computes with a watched weight.

    An embedding, which looks rows up, has no geometry.

    Args:
        weights: names of the watched weights, by `weight_key`.
        decisions: records or replays what the network decides on the way.
    """

    def __init__(self, weights: Mapping[int, str], on_call: OnCall, decisions: Decisions | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self._on_call = on_call
        self._decisions = decisions

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
        """One operator: seen, then computed."""
        if operator in _CONVOLUTIONS:
            self._see_convolution(*args)
        elif operator in _PRODUCTS:
            self._see_product(*(args[place] for place in _PRODUCTS[operator]))
        elif operator is _aten.embedding.default and (name := self._name(args[0])) is not None:
            self._on_call(name, args[1], None)
        if self._decisions is not None:
            return self._decisions.compute(operator, args, kwargs or {})
        return operator(*args, **(kwargs or {}))

    def _name(self, weight: Tensor) -> str | None:
        return self._weights.get(weight_key(weight)) if weight.numel() else None

    def _see_convolution(self, x: Tensor, weight: Tensor, bias: Any, *arguments: Any) -> None:
        name = self._name(weight)
        if name is not None:
            stride, padding, dilation, is_transposed, _, groups = arguments
            kernel = tuple(weight.shape[2:])
            plain = Geometry.of(kernel, stride, padding, dilation, groups)
            self._on_call(name, x, pointwise(len(kernel), groups) if is_transposed else plain)

    def _see_product(self, x: Tensor, weight: Tensor) -> None:
        name = self._name(weight)
        if name is not None:
            self._on_call(name, x, Geometry.linear())
