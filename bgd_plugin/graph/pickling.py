"""Pickling of a network whose class cannot be imported, such as a class local to a function: as its graph."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

from torch import fx, nn

from bgd_plugin.graph.tracer import trace

__all__ = ["make_picklable_"]

_OURS = ("__reduce_ex__", "__deepcopy__")


def make_picklable_(network: nn.Module) -> None:
    """Make a network whose class cannot be imported picklable, in place; it is unpickled as a `GraphModule`.

    Pickle stores a class by its name, so the float network could not be pickled at all. Copies keep the class.
    """
    kind = type(network)
    if isinstance(network, fx.GraphModule) or _is_importable(kind) or any(hasattr(kind, name) for name in _OURS[1:]):
        return
    vars(network)["__reduce_ex__"] = functools.partial(_reduced, network)
    vars(network)["__deepcopy__"] = functools.partial(_copied, network)


def _is_importable(kind: type) -> bool:
    """Whether pickle would find a class by its name."""
    found: Any = sys.modules.get(kind.__module__)
    for atom in kind.__qualname__.split("."):
        found = getattr(found, atom, None)
    return found is kind or hasattr(kind, "_float_class")


def _reduced(network: nn.Module, protocol: Any) -> Any:
    plain = _copied(network, {})
    for name in _OURS:
        vars(plain).pop(name, None)
    return trace(plain).__reduce_ex__(protocol)


def _copied(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    result: nn.Module = network.__class__.__new__(network.__class__)
    memo[id(network)] = result
    attributes = {name: value for name, value in vars(network).items() if name not in _OURS}
    vars(result).update(copy.deepcopy(attributes, memo))
    make_picklable_(result)
    return result
