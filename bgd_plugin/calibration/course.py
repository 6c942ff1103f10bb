"""Whether the course of a run depends on values, or on shapes alone.

If on shapes alone, a run on other values of the same shapes takes the same course: the same operators in the same
order, on tensors that come from the same places. One run then tells about all of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch

__all__ = ["Course", "shapes_of"]

_aten: Any = torch.ops.aten
# methods through which values leave torch without an operator that would be seen
_READINGS = frozenset(getattr(Tensor, name) for name in ("tolist", "numpy", "__array__", "__dlpack__"))
_BY_VALUE = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))
_TRUTHS = (torch.bool, torch.uint8)


class Course(TorchFunctionMode):
    """Notices in a run, inside the `with` block, what could make its course depend on values.

    That is a value read by Python, and an operator whose output's shape depends on values; decisions are recorded
    elsewhere (`calibration.replay`). Memory read at its address, or a number that Python draws, is not seen.

    Attributes:
        is_fixed: whether nothing was noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_fixed = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one of torch's functions, then call it."""
        if function in _READINGS:
            self.is_fixed = False
        return function(*args, **(kwargs or {}))

    def computes(self, operator: Any, args: Any) -> None:
        """Look at one operator.

        Args:
            operator: of torch.
            args: its positional arguments.
        """
        if not self.is_fixed or _BY_VALUE.isdisjoint(operator.tags):
            return
        if operator is not _aten.index.Tensor or any(t is not None and t.dtype in _TRUTHS for t in args[1]):
            self.is_fixed = False


def shapes_of(batch: Batch) -> Hashable:
    """A key that batches have in common if they differ in the values of their tensors alone; None if that is unknown.

    Args:
        batch: the arguments, nested as they are; tensors of any shapes.
    """
    leaves, structure = pytree.tree_flatten((batch.args, batch.kwargs))
    kinds = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if _is_plain(t) else t for t in leaves]
    if any(not isinstance(kind, tuple | str | int | float | bool | None) for kind in kinds):
        return None
    return (str(structure), tuple(zip(map(type, leaves), kinds, strict=True)))


def _is_plain(leaf: Any) -> bool:
    return type(leaf) is Tensor and leaf.layout is torch.strided
