"""State outside a network that its code can change: dicts that hooks write to, counters, variables of closures.

Runs and traces use copies of the network, but a copy shares the network's functions and the variables that they close
over. These values are saved before the work and restored afterwards.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from bgd_plugin.graph.copying import functions_of
from bgd_plugin.support.modes import plain_modes

__all__ = ["isolated", "world_kept"]

P = ParamSpec("P")
R = TypeVar("R")

_DEPTH = 6  # maximum nesting of containers that is followed
_LIBRARIES = frozenset(("torch", "builtins", "numpy", "bgd_plugin"))
_CONTAINERS = (dict, list, set, collections.deque)
_PLAIN: tuple[Any, ...] = (collections.OrderedDict, *_CONTAINERS)
_ADD: dict[Any, Callable[[Any, Any], object]] = {
    collections.OrderedDict: lambda held, pair: collections.OrderedDict.__setitem__(held, *pair),
    dict: lambda held, pair: dict.__setitem__(held, *pair),
    list: list.append,
    set: set.add,
    collections.deque: collections.deque.append,
}
_SIMPLE = (int, float, complex, str, bytes, bool, type(None))


@contextmanager
def world_kept(*models: nn.Module) -> Iterator[None]:
    """Restore, at the end, what the code of these networks has changed outside of them.

    Code means hooks, functions among the attributes, and the methods and attributes of the user's own classes. Restored
    are variables of closures, default arguments, global containers that the code names, and attributes of objects, up
    to six containers deep.
    """
    noted = _Noted()
    for model in models:
        for module in model.modules():
            noted.look(functions_of(module))
            noted.look(_own_class(module))
    try:
        yield
    finally:
        noted.put_back()


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function in `plain_modes`, and restore what the networks among its arguments change outside of them."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        networks = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        parameters = (parameter for network in networks for parameter in network.parameters())
        device = next((parameter.device for parameter in parameters if not parameter.is_meta), None)
        with plain_modes(device), world_kept(*networks):
            return function(*args, **kwargs)

    return wrapped


def _own_class(module: nn.Module) -> list[Any]:
    """The classes of a module that are not a library's, and their methods."""
    classes = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in _LIBRARIES]
    return [*classes, *(value for kind in classes for value in vars(kind).values() if callable(value))]


class _Noted:
    """Saved values, and how to restore them."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], object]] = []

    def put_back(self) -> None:
        """Undo every change."""
        for undo in self._undo:
            undo()

    def look(self, value: Any, depth: int = _DEPTH) -> None:
        """Save a value and what it contains."""
        if depth < 0 or isinstance(value, (*_SIMPLE, types.ModuleType)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # kept alive, so that its id stays unique
        for part in self._note(value):
            self.look(part, depth - 1)

    def _note(self, value: Any) -> Iterable[Any]:
        """Save a value's content; returns the values in it."""
        if isinstance(value, types.FunctionType):
            return self._note_function(value)
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        if isinstance(value, nn.Module):
            return []  # a copy is used instead
        if isinstance(value, Tensor):
            self._note_tensor(value)
            return []
        if isinstance(value, type):
            return self._note_class(value)
        if isinstance(value, _CONTAINERS):
            return self._note_container(value)
        if isinstance(value, tuple):
            return value
        return self._note_container(vars(value)) if _is_users_object(value) else []

    def _note_function(self, function: types.FunctionType) -> Iterable[Any]:
        if function.__module__ and function.__module__.partition(".")[0] in _LIBRARIES:
            return []
        contents = []
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a variable without a value yet
                continue
            self._undo.append(functools.partial(setattr, cell, "cell_contents", content))
            contents.append(content)
        names = [name for name in function.__code__.co_names if name in function.__globals__]
        held = [function.__globals__[name] for name in names]
        for name, value in zip(names, held, strict=True):
            if isinstance(value, _SIMPLE):  # `global count; count += 1`
                self._undo.append(functools.partial(function.__globals__.__setitem__, name, value))
        containers = [value for value in held if isinstance(value, (*_CONTAINERS, Tensor))]
        return [*contents, *containers, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]

    def _note_class(self, kind: type) -> Iterable[Any]:
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            return []
        for name, value in list(vars(kind).items()):
            if isinstance(value, (*_SIMPLE, Tensor)) and not name.startswith("__"):
                self._undo.append(functools.partial(_set_in_class, kind, name, value))
        return [value for value in vars(kind).values() if isinstance(value, (*_CONTAINERS, Tensor))]

    def _note_container(self, container: Any) -> Iterable[Any]:
        base = next(kind for kind in _PLAIN if isinstance(container, kind))
        content = list(_held(container))

        def put_back() -> None:
            if _flat(_held(container)) != _flat(content):
                base.clear(container)
                for item in content:
                    _ADD[base](container, item)

        self._undo.append(put_back)
        return [value for _, value in content] if issubclass(base, dict) else content

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.is_inference():
            return
        content, version = tensor.detach().clone(), tensor._version

        def put_back() -> None:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(content)

        self._undo.append(put_back)


def _held(container: Any) -> Iterable[Any]:
    """The items of a container, of a dict its pairs; read by the base class, because a subclass may create items."""
    if isinstance(container, dict):
        return dict.items(container)
    base = next(kind for kind in _PLAIN if isinstance(container, kind))
    items: Iterable[Any] = base.__iter__(container)
    return items


def _flat(items: Iterable[Any]) -> list[int]:
    """The ids of a container's items, in order; for a pair, the ids of both."""
    return [id(part) for item in items for part in (item if isinstance(item, tuple) else (item,))]


def _is_users_object(value: Any) -> bool:
    """Whether a value is an object of the user's own class, whose attributes can be changed."""
    origin = type(value).__module__.partition(".")[0]
    is_theirs = origin not in _LIBRARIES and origin not in sys.stdlib_module_names
    return is_theirs and isinstance(getattr(value, "__dict__", None), dict)


def _set_in_class(kind: type, name: str, value: Any) -> None:
    if vars(kind).get(name) is not value:
        setattr(kind, name, value)
