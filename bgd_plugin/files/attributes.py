"""Tensors of a network that are in no state dict: plain attributes, and buffers that are not persistent.

They may hold what a network needs, and the network that a file is loaded into has its own. Small ones are stored; of
large ones, such as tables of masks, the file has a fingerprint, and loading refuses a network with other values.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgd_plugin.graph import is_quantized_elsewhere, module_or_none

__all__ = ["dict_entries", "fingerprint", "give_attributes_", "note_scratch_", "other_tensors"]

MOST_BYTES = 16384
"""Of a tensor that is stored whole."""

_TOLERANCE = 1e-5
_DEPTH = 3
_OF_A_GRAPH = ("_graph", "_code", "_tracer_cls", "_tracer_extras", "meta")
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def other_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors, of any shape, in no state dict: by name, those stored whole, and those stored as fingerprints."""
    whole: dict[str, Tensor] = {}
    marked: dict[str, Tensor] = {}
    known = {*map(id, model.modules()), *map(id, model.parameters()), *map(id, model.buffers())}
    for path, module in model.named_modules(remove_duplicate=False):
        # another library's quantized layer keeps what it needs in its state, and decoded weights beside it for speed
        if isinstance(module, torch.jit.ScriptModule) or is_quantized_elsewhere(module):
            continue
        scratch = _scratch.get(module, frozenset())
        for name, value, is_held in _tensors_of(module, known):
            is_whole = is_held and value.numel() * value.element_size() <= MOST_BYTES
            if is_whole or name not in scratch:
                (whole if is_whole else marked)[f"{path}.{name}".lstrip(".")] = value.detach()
    return whole, marked


_scratch: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
"""Of modules, the names of tensors that a run writes, and that no answer depends on: caches, what hooks record."""


def note_scratch_(model: nn.Module, names: Iterable[str]) -> None:
    """Note that no file needs to hold anything of some tensors, `names` as in `other_tensors`, of a network."""
    of_path: dict[str, set[str]] = {}
    for name in names:
        head, bracket, rest = name.partition("[")
        path, _, attribute = head.rpartition(".")
        of_path.setdefault(path, set()).add(attribute + bracket + rest)
    for path, those in of_path.items():
        if (module := module_or_none(model, path)) is not None:
            _scratch[module] = _scratch.get(module, frozenset()) | those


def _tensors_of(module: nn.Module, known: set[int]) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, value, and whether the module itself holds it, rather than a container."""
    for name in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(name)
        if buffer is not None:
            yield name, buffer, True
    for name, value in vars(module).items():
        if name in _TABLES or isinstance(getattr(type(module), name, None), functools.cached_property):
            continue
        if isinstance(value, Tensor):
            if id(value) not in known:
                yield name, value, not isinstance(value, nn.Parameter)
        elif not isinstance(module, fx.GraphModule) or name not in _OF_A_GRAPH:
            yield from ((part, tensor, False) for part, tensor in _within(name, value, known, _DEPTH))


def _within(name: str, value: Any, known: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the tensors in containers, and of modules that the network has not registered."""
    if depth < 0 or id(value) in known:
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _within(f"{name}[{index}]", part, known, depth - 1)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _within(f"{name}[{key}]", part, known, depth - 1)
    elif isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        for inner, tensor in (*value.named_parameters(), *value.named_buffers()):
            if id(tensor) not in known:
                yield f"{name}[{inner}]", tensor


def fingerprint(tensor: Tensor) -> list[Any]:
    """A tensor's dtype, shape, and two sums that other values would hardly have; rounding differs between machines."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta or tensor.is_complex() or not tensor.numel():
        return [dtype, list(tensor.shape), 0.0, 0.0]
    flat = tensor.detach().cpu().reshape(-1).double().nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9)
    weights = torch.linspace(1, 2, flat.numel(), dtype=torch.float64)
    return [dtype, list(tensor.shape), float(flat.abs().sum()), float((flat * weights).sum())]


def _is_alike(found: list[Any], wanted: Any) -> bool:
    match wanted:
        case [str(dtype), list(shape), float(size), float(weighted)] if found[:2] == [dtype, shape]:
            tolerance = _TOLERANCE * max(size, 1e-30)
            return math.isclose(found[2], size, abs_tol=tolerance) and math.isclose(
                found[3], weighted, abs_tol=2 * tolerance
            )
    return False


def give_attributes_(
    network: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor], problems: list[str]
) -> None:
    """Give a network the tensors that a file holds besides its state, as the file's header names them.

    Args:
        network: changed in place.
        header: of the file.
        tensors: of the file, by name, each of the shape that the header names.
        problems: what does not fit is appended, as text.
    """
    device = next((p.device for p in network.parameters() if not p.is_meta), torch.device("cpu"))
    aliases: dict[str, Any] = header.get("aliases", {})
    for name, dtype in header.get("attributes", {}).items():
        path, _, attribute = name.rpartition(".")
        owner, value = module_or_none(network, path), tensors.get(str(aliases.get(name, name)))
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if owner is None or value is None or not isinstance(kind, torch.dtype) or not _may_hold(owner, attribute):
            problems.append(f"{name!r} is in the file; the network has no place for it")
        elif attribute in owner._buffers:
            owner._buffers[attribute] = value.to(device, kind, copy=True)
        else:
            vars(owner)[attribute] = value.to(device, kind, copy=True)
    wanted: dict[str, Any] = header.get("marks", {})
    _drop_cached_(network, {*wanted, *header.get("attributes", {})})
    if wanted:
        whole, marked = other_tensors(network)
        for name, mark in wanted.items():
            mine = {**whole, **marked}.get(name)
            if mine is None or not (mine.is_meta or _is_alike(fingerprint(mine), mark)):
                problems.append(
                    f"{name!r}: the file holds only a fingerprint of it, and the network's own has other values: give "
                    "a network that was built as the compressed one was"
                )


def _drop_cached_(network: nn.Module, names: set[str]) -> None:
    """Take tensors out of a network's dicts that the compressed one did not have there: a run has left them behind."""
    for name, table, key, _ in dict_entries(network):
        if name not in names:
            table.pop(key, None)
    for module in network.modules():
        for attribute in list(vars(module)):
            if isinstance(getattr(type(module), attribute, None), functools.cached_property):
                del vars(module)[attribute]


def dict_entries(network: nn.Module) -> list[tuple[str, dict[Any, Any], Any, Tensor]]:
    """Tensors, of any shape, in dicts that a network holds: name as in `other_tensors`, dict, key, and tensor."""
    return [
        (f"{path}.{attribute}[{key}]".lstrip("."), value, key, part)
        for path, module in network.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _TABLES and type(value) is dict and "hooks" not in attribute
        for key, part in value.items()
        if isinstance(part, Tensor)
    ]


def _may_hold(owner: nn.Module, attribute: str) -> bool:
    """Whether a module has a place for a tensor: a tensor there, or nothing at all."""
    if attribute in owner._buffers:
        return True
    held = vars(owner).get(attribute)
    is_free = held is None and not hasattr(type(owner), attribute) and attribute not in owner._modules
    return isinstance(held, Tensor) or (is_free and attribute not in owner._parameters and attribute.isidentifier())
