"""Where a residual branch ends: a layer's output is added to something, the skip connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BranchEnd"]

_aten: Any = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_ADDITIONS = (_aten.add.Tensor, _aten.add_.Tensor)


class BranchEnd:
    """Follows the output of the layer that ran last, operator by operator.

    Between the layer and the addition there may be a bias and views, and nothing else.
    """

    def __init__(self) -> None:
        self._name = ""
        self._is_next = False
        self._output: Tensor | None = None

    def layer(self, name: str) -> None:
        """A layer is about to run: the next operator gives its output.

        Args:
            name: of the layer.
        """
        self._name, self._is_next, self._output = name, True, None

    def before(self, operator: Any, args: Any) -> tuple[str, Tensor] | None:
        """What is added to the layer's output by an operator that is about to run.

        Args:
            operator: of torch.
            args: its arguments.

        Returns:
            the layer's name, and the other summand, of the output's shape; None if the operator is no such addition.
        """
        if self._output is None:
            return None
        is_output = [isinstance(x, Tensor) and _memory(x) == _memory(self._output) for x in args[:2]]
        if operator in _ADDITIONS and sum(is_output) == 1:
            own, other = (args[0], args[1]) if is_output[0] else (args[1], args[0])
            if isinstance(other, Tensor) and other.shape == own.shape:
                self._output = None
                return self._name, other
            self._is_next = isinstance(other, Tensor) and other.ndim == 1  # a bias
        elif operator._schema.is_mutable and any(is_output):
            self._output = None
        return None

    def blank(self, operator: Any, args: Any) -> Tensor | None:
        """Zeros in place of the layer's output, which nobody is going to read.

        Args:
            operator: about to run.
            args: its arguments.

        Returns:
            zeros `[rows, columns]`; None if the operator is not the layer's, or no plain product.
        """
        if not self._is_next or operator not in _PRODUCTS:
            return None
        x, weight = args[-2:]
        zeros: Tensor = x.new_zeros(x.shape[0], weight.shape[1])
        return zeros

    def after(self, result: Any) -> None:
        """An operator has run.

        Args:
            result: of the operator.
        """
        if self._is_next:
            self._output, self._is_next = result if isinstance(result, Tensor) else None, False


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a sparse tensor, for one
        return id(tensor)
