"""Computed parameters: reading `module.weight` then returns the output of another module.

A module whose code reads its parameter by name (`F.linear(x, self.in_proj_weight)`), and is not a graph that could be
rewritten, keeps its code and gets a new class in which the name is a property. The computing module is registered under
the parameter's name, so names in a state dict keep their beginning. While the module's own `forward` runs, each name is
computed once, however often the code reads it: `nn.MultiheadAttention` reads its weight four times.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bgd_plugin.nn import PQWeight

__all__ = [
    "compute_parameter_",
    "computed_parameters",
    "loosen_parameter_",
    "module_at",
    "module_or_none",
    "restore_parameter_",
    "set_apart_",
]


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below `root`, also if reading the name returns a computed weight.

    Raises:
        AttributeError: there is none.
    """
    module = module_or_none(root, path)
    if module is None:
        raise AttributeError(f"{type(root).__name__} has no module {path!r}")
    return module


def module_or_none(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below `root`; None if there is none, for example at a parameter's path."""
    module: nn.Module | None = root
    for atom in filter(None, path.split(".")):
        module = None if module is None else module._modules.get(atom)
    return module


def compute_parameter_(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a parameter by a computed one, in place: reading it then returns `module()`.

    Args:
        owner: the module that has the parameter; it gets a class of its own.
        name: the parameter's name, or that of a computed parameter whose module is exchanged.
        module: returns the value when called without arguments.
    """
    names = computed_parameters(owner)
    if name not in names:
        owner._parameters.pop(name, None)
        owner.__class__ = _class(_float_class(owner), (*names, name))
    owner._modules[name] = module
    if isinstance(owner, nn.RNNBase):
        vars(owner).pop("_flat_weights", None)


def loosen_parameter_(owner: nn.Module, name: str) -> None:
    """Let the name of a computed parameter stand for the module that computes it; `compute_parameter_` undoes this.

    Args:
        owner: the module that has the computed parameter.
        name: its name.
    """
    names = tuple(n for n in computed_parameters(owner) if n != name)
    owner.__class__ = _class(_float_class(owner), names) if names else _float_class(owner)


def restore_parameter_(owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Undo `compute_parameter_`, in place.

    Args:
        owner: the module that has the computed parameter.
        name: its name.
        parameter: the parameter to put back.
    """
    loosen_parameter_(owner, name)
    del owner._modules[name]
    owner.register_parameter(name, parameter)
    if isinstance(owner, nn.RNNBase) and not computed_parameters(owner):
        vars(owner)["_flat_weights"] = _flat_weights(owner)


def set_apart_(root: nn.Module) -> None:
    """Register each computing module beside its parameter, as `NAME_computed`, in place.

    The network cannot be loaded or saved then; but torch's functional calls, and so `torch.export`, look up modules by
    `getattr`, which would return the computed parameter instead of its module.
    """
    for owner in list(root.modules()):
        names = computed_parameters(owner)
        if not names:
            continue
        for name in names:
            owner._modules[f"{name}_computed"] = owner._modules.pop(name)
        base = _float_class(owner)
        readers = {name: property(_reader(f"{name}_computed")) for name in names}
        owner.__class__ = type(base.__name__, (base,), {**readers, "__module__": base.__module__})


def computed_parameters(owner: nn.Module) -> tuple[str, ...]:
    """The names of a module's parameters that are computed."""
    names: tuple[str, ...] = getattr(type(owner), "_computed_parameters", ())
    return names


def _float_class(owner: nn.Module) -> type[nn.Module]:
    kind: type[nn.Module] = getattr(type(owner), "_float_class", type(owner))
    return kind


def _class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    content: dict[str, Any] = {name: property(_reader(name)) for name in names}
    if issubclass(base, nn.RNNBase):  # torch keeps a list of their weights, which would go on being the float ones
        content["_flat_weights"] = property(_flat_weights, lambda owner, weights: None)
    content |= {"_computed_parameters": names, "_float_class": base, "__reduce_ex__": _reduce}
    content["forward"] = _reading_once(base.forward)
    return type(base.__name__, (base,), content | {"__module__": base.__module__, "__doc__": base.__doc__})


class _Reads(threading.local):
    """What the calls that run in this thread have read of computed parameters, by the owner's identity and the name."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, Any]] = {}


_reads = _Reads()


def _reader(name: str) -> Callable[[nn.Module], Any]:
    def read(owner: nn.Module) -> Any:
        module: Any = owner._modules[name]
        known = None if torch.compiler.is_compiling() else _reads.of.get(id(owner))
        if known is None:
            return module()
        if name not in known:
            known[name] = module.pending() if isinstance(module, PQWeight) else module()
        return known[name]

    return read


def _reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's `forward`, during which its computed parameters are computed once; the compiler sees the original."""

    @functools.wraps(forward)
    def wrapper(owner: nn.Module, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or id(owner) in _reads.of:
            return forward(owner, *arguments, **options)
        _reads.of[id(owner)] = {}
        try:
            return forward(owner, *arguments, **options)
        finally:
            del _reads.of[id(owner)]

    return wrapper


def _flat_weights(owner: Any) -> list[Any]:
    return [getattr(owner, name, None) for name in owner._flat_weights_names]


def _reduce(owner: nn.Module, protocol: Any) -> Any:
    """Copy and pickle by the class that can be imported."""
    return _blank, (_float_class(owner), computed_parameters(owner)), owner.__getstate__()  # type: ignore[no-untyped-call]


def _blank(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _class(base, names)
    return kind.__new__(kind)
