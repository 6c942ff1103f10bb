"""Step between a network and the modules that it calls, hooks included, while it runs as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bgd_plugin.graph import module_or_none

__all__ = ["OnModule", "intercepted", "run_module"]

OnModule = Callable[..., Any]
"""Called as `on_module(path, module, *args, **kwargs)`; what it returns is what the caller of the module gets."""

_SLOT = "_compiled_call_impl"  # what torch calls in place of a module's forward and hooks, where it is set


@contextmanager
def intercepted(network: nn.Module, paths: Iterable[str], on_module: OnModule) -> Iterator[None]:
    """Let `on_module` answer the calls of the modules at `paths`; a path without a module is passed over."""
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
    """What a call of the module gives that nobody intercepts: forward and hooks."""
    call: Any = module._call_impl
    return call(*args, **kwargs)
