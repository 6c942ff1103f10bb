"""Intercept a network's calls of its modules, hooks included, without changing its code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bgd_plugin.graph import module_or_none

__all__ = ["OnModule", "intercepted", "run_module"]

OnModule = Callable[..., Any]
"""Called as `on_module(path, module, *args, **kwargs)`; its result is returned to the module's caller."""

_SLOT = "_compiled_call_impl"  # if set, torch calls it instead of the module's forward and hooks


@contextmanager
def intercepted(network: nn.Module, paths: Iterable[str], on_module: OnModule) -> Iterator[None]:
    """While the context is open, `on_module` answers the network's calls of the modules at `paths`.

    Paths without a module are ignored.
    """
    changed: list[tuple[dict[str, Any], Any]] = []
    try:
        for path in paths:
            module = module_or_none(network, path)
            if module is not None:
                attributes = vars(module)
                changed.append((attributes, attributes.get(_SLOT)))
                attributes[_SLOT] = functools.partial(on_module, path, module)
        yield
    finally:
        for attributes, before in reversed(changed):
            if before is None:
                attributes.pop(_SLOT, None)
            else:
                attributes[_SLOT] = before


def run_module(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run the module's forward and hooks on positional `args` and keyword `kwargs`, without interception."""
    call: Any = module._call_impl
    return call(*args, **kwargs)
