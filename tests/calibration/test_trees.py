"""Trees of values, against torch's pytree."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.trees import leaves, mapped


class _Pair(NamedTuple):
    left: Any
    right: Any


class _Own:
    """Not a container to pytree."""


_A, _B = torch.zeros(2), torch.ones(3)
_TREES: list[Any] = [
    _A,
    None,
    3,
    "text",
    _Own(),
    {},
    [],
    (),
    {"x": _A, "y": [_B, (None, 2.5)], 3: {"z": (_A,)}},
    [_Pair(_A, [_B]), OrderedDict(b=_A, a=(_B, None)), defaultdict(list, c=[_A])],
    (torch.Size([2, 3]), nn.Parameter(_A), {"deep": _Pair(None, {"k": (_A, _A)})}, torch.return_types.max((_A, _B))),
]


@pytest.mark.parametrize("tree", _TREES, ids=lambda tree: type(tree).__name__)
def test_leaves_are_those_of_pytree_in_its_order(tree: Any) -> None:
    mine, theirs = list(leaves(tree)), pytree.tree_leaves(tree)
    assert len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("tree", _TREES, ids=lambda tree: type(tree).__name__)
def test_a_mapped_tree_is_that_of_pytree(tree: Any) -> None:
    mine, theirs = mapped(lambda x: (id(x), "seen"), tree), pytree.tree_map(lambda x: (id(x), "seen"), tree)
    assert mine == theirs and type(mine) is type(theirs)
