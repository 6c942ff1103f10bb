"""Run networks without a trace of it in them: as they are, and put back afterwards, or as copies.

What a run writes is found among a network's buffers, attributes, and what these hold. Where all of that is of kinds
whose content can be noted and put back, a run needs no copy.
"""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import pathlib
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.graph.copying import copy_module

__all__ = ["state_kept", "untouched"]

_DEPTH = 8  # containers and objects within others that are looked into
_CONSTANT = (
    *(int, float, complex, str, bytes, type(None), range, slice, enum.Enum, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(
        types.FunctionType,
        types.BuiltinFunctionType,
        weakref.ref,
        re.Pattern,
        pathlib.PurePath,
        fx.Graph,
        pytree.TreeSpec,
    ),
)
_CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, dict, list, set, collections.deque)
_GRAPH_PARTS = frozenset(("_graph", "_code", "_tracer_cls", "_tracer_extras", "meta"))
"""Attributes of a `GraphModule` that say how it was made; a run only reads them."""


@contextmanager
def untouched(*networks: nn.Module) -> Iterator[list[Any]]:
    """Give networks that can be run, and changed as a run changes them, without the given ones being changed.

    Parameters are shared: never write to them. Functions that the networks hold are not looked into.

    Args:
        networks: they are as they were once the context ends.

    Yields:
        for each network itself, or where what it holds cannot be put back (a lock, an array of another library, a
        random number generator), a copy.

    Raises:
        ConfigError: as `copy_module`.
    """
    states: dict[int, _State] = {}
    given = []
    for network in networks:
        state = _State(list(network.modules()))
        if state.is_known:
            states[id(network)] = state
        given.append(network if state.is_known else copy_module(network, share_tensors=True))
    try:
        yield given
    finally:
        for state in states.values():
            state.put_back()


@contextmanager
def state_kept(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[set[str]]:
    """Put back, at the end, what runs wrote into some modules: counters, caches, buffers.

    Args:
        modules: by path; of each, what it holds itself.

    Yields:
        a set, which holds the paths of the modules that were written to once the context has ended.
    """
    written: set[str] = set()
    states = [(path, _State([module])) for path, module in modules]
    try:
        yield written
    finally:
        written |= {path for path, state in states if state.put_back()}


class _State:
    """What a run of some modules may write to, and how to put it back.

    Attributes:
        is_known: whether that is all of it.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.is_known = True
        self._undo: list[Callable[[], bool]] = []
        self._seen: dict[int, Any] = {id(module): module for module in modules}
        for module in modules:
            self._module(module)

    @torch.no_grad()
    def put_back(self) -> bool:
        """Make everything what it was; whether anything was not."""
        changes = [undo() for undo in self._undo]  # all of them
        return any(changes)

    def _module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):  # its values are not in Python
            self.is_known = False
            return
        attributes = vars(module)
        self._class(module)
        self._container(attributes, dict)
        for name, value in attributes.items():
            if name in ("_parameters", "_modules"):
                self._container(value, dict)
            elif not (isinstance(module, fx.GraphModule) and name in _GRAPH_PARTS):
                self._look(value, _DEPTH)

    def _class(self, module: nn.Module) -> None:
        kind = type(module)  # a parameter that is computed makes it another one

        def put_back() -> bool:
            is_changed = type(module) is not kind
            if is_changed:
                module.__class__ = kind
            return is_changed

        self._undo.append(put_back)

    def _look(self, value: Any, depth: int) -> None:
        if isinstance(value, _CONSTANT) or id(value) in self._seen or not self.is_known:
            return
        self._seen[id(value)] = value  # kept alive: its id is its name here
        if isinstance(value, nn.Parameter):
            return
        parts = self._parts(value) if depth else None
        if parts is None:
            self.is_known = False
        for part in parts or ():
            self._look(part, depth - 1)

    def _parts(self, value: Any) -> list[Any] | None:
        """Note a value's content, and give what it holds; None where it cannot be noted."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, types.MethodType):
            return [value.__self__]
        if isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, (tuple, frozenset)):
            return [*value, *self._own_attributes(value)]
        kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
        if kind is not None:
            self._container(value, kind)
            held = [part for item in _items(value, kind) for part in (item if issubclass(kind, dict) else (item,))]
            return [*held, *self._own_attributes(value)]
        return self._own_attributes(value) if _is_made_of_attributes(value) else None

    def _own_attributes(self, value: Any) -> list[Any]:
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return []
        self._container(attributes, dict)
        return list(attributes.values())

    def _tensor(self, tensor: Tensor) -> list[Any] | None:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_inference():
            return None
        if not tensor.is_meta:
            content = tensor.detach().clone()

            def put_back() -> bool:
                if tensor.shape != content.shape or tensor.dtype != content.dtype:
                    tensor.data = content
                    return True
                if torch.equal(tensor, content):
                    return False
                tensor.copy_(content)
                return True

            self._undo.append(put_back)
        return []

    def _container(self, container: Any, kind: Any) -> None:
        content = _items(container, kind)

        def put_back() -> bool:
            is_changed = [*map(_identity, _items(container, kind))] != [*map(_identity, content)]
            if is_changed:
                kind.clear(container)
                (kind.update if kind not in (list, collections.deque) else kind.extend)(container, content)
            return is_changed

        self._undo.append(put_back)


def _items(container: Any, kind: Any) -> list[Any]:
    """What is in a container, of a mapping its pairs; past methods of its own."""
    return list(kind.items(container) if issubclass(kind, dict) else kind.__iter__(container))


def _identity(item: Any) -> Any:
    return tuple(map(id, item)) if isinstance(item, tuple) else id(item)


def _is_made_of_attributes(value: Any) -> bool:
    """Whether an object has no state but its attributes: neither slots nor what its class keeps outside of Python."""
    kind: Any = type(value)
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return False
    try:
        object.__reduce_ex__(value, 4)  # refuses objects with other state
    except Exception:  # runs the code of the object's class
        return False
    slots: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return not slots and hasattr(value, "__dict__")
