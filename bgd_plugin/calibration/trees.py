"""Trees of values, walked many thousand times in a run: plain containers quickly, others as torch's pytree does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["leaves", "mapped"]

_LEAVES = (Tensor, int, float, bool, str, type(None))


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of a tree, as `pytree.tree_leaves` gives them; None, too."""
    kind = type(tree)
    if kind in _LEAVES:
        yield tree
    elif kind is dict:
        for value in tree.values():
            yield from leaves(value)
    elif kind is list or kind is tuple:
        for value in tree:
            yield from leaves(value)
    else:
        yield from pytree.tree_leaves(tree)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same form with `function` applied to each leaf, as by `pytree.tree_map`."""
    kind = type(tree)
    if kind in _LEAVES:
        return function(tree)
    if kind is dict:
        return {key: mapped(function, value) for key, value in tree.items()}
    if kind is list:
        return [mapped(function, value) for value in tree]
    if kind is tuple:
        return tuple([mapped(function, value) for value in tree])
    return pytree.tree_map(function, tree)
