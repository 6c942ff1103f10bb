"""References to modules and tensors that a network holds beside its own tables: in lists, functions, objects.

A module that is replaced at its path would live on there. So these references are made to follow.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Memo", "followed", "rebind_", "redirect_"]

Memo = dict[int, Any]
"""Copies, or what else takes the place of an object, by the object's id."""

_DEPTH = 4
_TABLES = frozenset(("_parameters", "_buffers", "_modules"))
_OF_A_GRAPH = frozenset(("_graph", "_code", "_tracer_cls", "_tracer_extras", "meta"))
_PLAIN = frozenset((type(None), bool, int, float, str))
_CONTAINERS = frozenset((dict, list, OrderedDict))
_LIBRARIES = frozenset(("torch", "builtins", "numpy", "bgd_plugin"))


def redirect_(network: nn.Module, memo: Memo) -> None:
    """`rebind_` for each module of a network.

    Args:
        network: changed in place, with the lists, dicts and objects that it holds.
        memo: what takes the place of an object.
    """
    seen: dict[int, int] = {}  # settings that all layers share are looked through once
    for module in network.modules():
        _rebind_(module, memo, seen)


@contextmanager
def followed(network: nn.Module) -> Iterator[None]:
    """A context in which parameters and buffers get new tensors: other references to the old ones follow at its end."""
    before = dict(_tensors(network))
    yield
    after = dict(_tensors(network))
    memo = {id(old): after[name] for name, old in before.items() if name in after and after[name] is not old}
    if memo:
        redirect_(network, memo)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def rebind_(module: nn.Module, memo: Memo) -> None:
    """Let what a module holds, its hooks among them, refer to the copy where it refers to the original.

    Args:
        module: changed in place, with its lists, dicts and objects.
        memo: what takes the place of an object.
    """
    _rebind_(module, memo, {})


def _rebind_(module: nn.Module, memo: Memo, seen: dict[int, int]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        return
    attributes = vars(module)
    is_graph = isinstance(module, fx.GraphModule)
    for name, value in attributes.items():
        if _is_plain(value) or name in _TABLES or (is_graph and name in _OF_A_GRAPH):
            continue
        attributes[name] = _followed(value, memo, seen, _DEPTH)


def _is_plain(value: Any) -> bool:
    """Whether a value refers to nothing; said at once of what most attributes are."""
    kind = type(value)
    return kind in _PLAIN or (kind in _CONTAINERS and not value)


def _followed(value: Any, memo: Memo, seen: dict[int, int], depth: int) -> Any:
    """A value that a module holds; containers and objects are changed in place, functions and tuples are made anew.

    Args:
        value: of any kind.
        memo: what takes the place of an object.
        seen: containers and objects that need not be looked through again to this depth, by id.
        depth: how many containers and objects deep to look.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module) or _is_plain(value) or seen.get(id(value), -1) >= depth or depth < 0:
        return value
    if _is_function(value):
        return _rebound(value, memo, {})
    if type(value) is tuple:
        parts = [_followed(part, memo, seen, depth - 1) for part in value]
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else tuple(parts)
    seen[id(value)] = depth
    held = _held(value)
    for key, part in held:
        new = _followed(part, memo, seen, depth - 1)
        if new is not part:
            _set(value, key, new)
    return value


def _held(value: Any) -> list[tuple[Any, Any]]:
    """What a container or an object of the user's class holds, by key, place or name."""
    if isinstance(value, dict):
        return list(dict.items(value))
    if isinstance(value, list):
        return list(enumerate(list.__iter__(value)))
    return list(vars(value).items()) if _is_users_object(value) else []


def _set(value: Any, key: Any, part: Any) -> None:
    if isinstance(value, dict):
        dict.__setitem__(value, key, part)
    elif isinstance(value, list):
        list.__setitem__(value, key, part)
    else:
        vars(value)[key] = part


def _is_users_object(value: Any) -> bool:
    origin = type(value).__module__.partition(".")[0]
    is_theirs = origin not in _LIBRARIES and origin not in sys.stdlib_module_names
    return is_theirs and not isinstance(value, type) and isinstance(getattr(value, "__dict__", None), dict)


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial, weakref.ref))


def _rebound(value: Any, memo: Memo, done: dict[int, Any]) -> Any:
    """A function, or a value that it holds, with copies in place of originals; unchanged if it refers to none."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, weakref.ref):
        target = memo.get(id(value()))
        return value if target is None or target is value() else weakref.ref(target)
    if isinstance(value, types.MethodType):
        owner = _rebound(value.__self__, memo, done)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = [_rebound(part, memo, done) for part in (value.func, *value.args)]
        keywords = {name: _rebound(part, memo, done) for name, part in value.keywords.items()}
        return functools.partial(parts[0], *parts[1:], **keywords)
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, memo, done)
    if isinstance(value, (tuple, list)) and any(_is_function(part) or id(part) in memo for part in value):
        return type(value)([_rebound(part, memo, done) for part in value]) if type(value) in (tuple, list) else value
    return memo.get(id(value), value)


def _rebound_function(function: types.FunctionType, memo: Memo, done: dict[int, Any]) -> types.FunctionType:
    cells = function.__closure__ or ()
    fresh = [types.CellType() for _ in cells]
    result = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(fresh)
    )
    done[id(function)] = result
    changed = False
    for new, old in zip(fresh, cells, strict=True):
        content = _content(old)
        inner = _rebound(content, memo, done)
        changed = changed or (inner is not content and inner is not result)
        if content is not _EMPTY:
            new.cell_contents = inner
    defaults = _rebound(function.__defaults__, memo, done)
    keywords = {name: _rebound(part, memo, done) for name, part in (function.__kwdefaults__ or {}).items()}
    changed = changed or defaults is not function.__defaults__
    changed = changed or any(part is not (function.__kwdefaults__ or {})[name] for name, part in keywords.items())
    if not changed:
        done[id(function)] = function
        return function
    functools.update_wrapper(result, function)
    vars(result).pop("__wrapped__", None)
    vars(result).update(vars(function))
    result.__defaults__, result.__kwdefaults__ = defaults, keywords or None
    return result


_EMPTY: Any = object()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value yet
        return _EMPTY
