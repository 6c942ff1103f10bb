"""Hooks of a module that another one takes the place of."""

from __future__ import annotations

from torch import nn

__all__ = ["take_hooks_"]

_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def take_hooks_(module: nn.Module, old: nn.Module) -> None:
    """Give `module` the hooks of the module in whose place it is put."""
    for table in _TABLES:
        vars(module)[table].update(vars(old)[table])
    vars(module)["_is_full_backward_hook"] = vars(old)["_is_full_backward_hook"]
