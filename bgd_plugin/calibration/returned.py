"""Modules that return what the last layer in them returns: an attention its output projection's, an MLP its last one's.

Such a module need not run again once this layer is fitted: its output is the layer's, computed from the inputs on which
the layer was fitted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["LastOutput", "Returned", "input_identity"]


@dataclass(frozen=True, kw_only=True)
class Returned:
    """A module's output that is the output of a layer in it, and nothing else.

    Attributes:
        layer: the layer's name.
        form: of the module's output; all its other leaves are None.
        place: of the layer's output among the leaves.
    """

    layer: str
    form: pytree.TreeSpec
    place: int

    def holding(self, output: Tensor) -> Any:
        """The module's output, around the layer's `output`, of any shape."""
        leaves = [output if place == self.place else None for place in range(self.form.num_leaves)]
        return pytree.tree_unflatten(leaves, self.form)


class LastOutput:
    """In a run, the output of the layer that ran last, in whichever module.

    Args:
        layers: names of the layers; those that are no modules return nothing.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self._layers = layers
        self._found: tuple[str, Tensor, tuple[Any, ...]] | None = None

    def returned_by(self, path: str, output: Any) -> Returned | None:
        """What a module returns, if it is what the last layer has returned.

        Args:
            path: of the module.
            output: its own.
        """
        if path in self._layers:
            identity = input_identity(output) if isinstance(output, Tensor) else None
            self._found = None if identity is None else (path, output, identity)
            return None
        if self._found is None:
            return None
        leaves, form = pytree.tree_flatten(output)
        places = [place for place, leaf in enumerate(leaves) if leaf is not None]
        if len(places) != 1 or not isinstance(leaves[places[0]], Tensor):
            return None
        is_same = input_identity(leaves[places[0]]) == self._found[2]
        return Returned(layer=self._found[0], form=form, place=places[0]) if is_same else None


def input_identity(x: Tensor) -> tuple[Any, ...] | None:
    """A key of a tensor x of any shape: equal for two handles of one unchanged tensor; None if that is unknown."""
    if x.is_inference():
        return None
    try:
        return (x.data_ptr(), x.dtype, x.shape, x.stride(), x._version, x.device)
    except RuntimeError:  # inside torch.func's transforms tensors have no memory
        return None
