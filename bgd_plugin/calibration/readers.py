"""From which modules' outputs a tensor was computed, followed operator by operator between the modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

__all__ = ["DECIDED", "Dataflow", "is_plain", "tensors_in"]

_aten: Any = torch.ops.aten
DECIDED = "decided"
"""The reader of values that decide which code runs next."""

_DECIDING = frozenset((_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default))
_PLAIN = (Tensor, type(None), bool, int, float, complex, str, torch.dtype, torch.device)

Sources = frozenset[str]
_NONE: Sources = frozenset()


class Dataflow:
    """Marks every tensor, by its memory, with the modules from whose outputs it was computed.

    Attributes:
        readers: for each module, the readers of its output: other modules whose output depends on it, layers, and
            `DECIDED`.
    """

    def __init__(self) -> None:
        self.readers: dict[str, set[str]] = {}
        self._sources: dict[int, Sources] = {}
        self._known: dict[int, StorageWeakRef] = {}  # keep the number of a storage, not its memory, from being reused

    def sources(self, tensors: Iterable[Tensor]) -> Sources:
        """The modules from whose outputs these tensors (any shapes) were computed."""
        return _NONE.union(*(self._sources.get(_memory(t), _NONE) for t in tensors))

    def read(self, reader: str, tensors: Iterable[Tensor]) -> None:
        """Record that `reader`, a module or layer, reads these tensors of any shape."""
        for source in self.sources(tensors):
            self.readers.setdefault(source, set()).add(reader)

    def computed(self, operator: Any, arguments: Any, result: Any) -> None:
        """Record the operator's result as computed from its arguments."""
        read = list(_tensors(arguments))
        sources = self.sources(read)
        if operator in _DECIDING:
            self.read(DECIDED, read)
        shared = {_memory(t) for t in read}
        for t in _tensors(result):
            memory = _memory(t)
            known = self._sources.get(memory, _NONE) if memory in shared else _NONE
            self._mark(t, memory, known | sources)
        if operator._schema.is_mutable:
            for t in read:
                self._mark(t, _memory(t), self._sources.get(_memory(t), _NONE) | sources)

    def left(self, module: str, given: Any, output: Any) -> None:
        """Record that a module returned `output`; parts of `given` that it returns unchanged keep their sources too."""
        tensors = tensors_in(output)
        self.read(module, tensors)
        shared = {_memory(t) for t in tensors_in(given)}
        for t in tensors:
            memory = _memory(t)
            passed = self._sources.get(memory, _NONE) if memory in shared else _NONE
            self._mark(t, memory, frozenset((module,)) | passed)

    def _mark(self, tensor: Tensor, memory: int, sources: Sources) -> None:
        if sources:
            self._sources[memory] = sources
            if memory not in self._known and memory != id(tensor):
                self._known[memory] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        else:
            self._sources.pop(memory, None)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, a tree of any structure and shapes."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def is_plain(value: Any) -> bool:
    """Whether a value is a tree of tensors and constants only, so that a copy can replace it."""
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # for example a sparse tensor
        return id(tensor)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results; operators nest lists and tuples only."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for argument in arguments:
            yield from _tensors(argument)
    elif isinstance(arguments, dict):
        yield from _tensors(list(arguments.values()))
