"""Trees of values, walked many thousand times in a run: plain containers quickly, others as torch's pytree does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["leaves", "mapped"]

_LEAVES: set[type] = {Tensor, int, float, bool, str, type(None)}
"""Kinds that have been found to be leaves, asked about many thousand times."""


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
    elif _is_leaf(tree):
        yield tree
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
    return function(tree) if _is_leaf(tree) else pytree.tree_map(function, tree)


def _is_leaf(tree: Any) -> bool:
    """Whether pytree takes a value for a leaf, which then all of its kind are; a kind is looked at once."""
    found = pytree.tree_leaves(tree)
    is_leaf = len(found) == 1 and found[0] is tree
    if is_leaf:
        _LEAVES.add(type(tree))
    return is_leaf
