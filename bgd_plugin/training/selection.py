"""Which of a network's parameters finetuning trains."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from bgd_plugin.errors import ConfigError

__all__ = ["trained_"]


def trained_(student: nn.Module, fixed: Collection[str], patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters to be trained; all others get no gradient, so that the backward pass ends where none is left.

    Args:
        student: its parameters' `requires_grad` is set.
        fixed: names of parameters that are not trained.
        patterns: globs on module names: what these modules and those in them hold is trained. None given: everything.

    Raises:
        ConfigError: a glob matches no module with a parameter that can be trained.
    """
    names = [
        (name, parameter)
        for name, parameter in student.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    ]
    left = {id(parameter) for name, parameter in names if name in fixed}
    chosen = {
        id(parameter): parameter
        for name, parameter in names
        if id(parameter) not in left and (not patterns or any(_is_in(name, pattern) for pattern in patterns))
    }
    for pattern in patterns:
        if not any(_is_in(name, pattern) for name, parameter in names if id(parameter) in chosen):
            raise ConfigError(f"finetuning: layers: no module named {pattern!r} has a parameter that can be trained")
    for _, parameter in names:
        parameter.requires_grad_(id(parameter) in chosen)
    return list(chosen.values())


def _is_in(parameter: str, pattern: str) -> bool:
    """Whether the module that holds a parameter, or one that this is in, has a name that matches."""
    return any(fnmatch.fnmatchcase(module, pattern) for module in _holders(parameter))


def _holders(parameter: str) -> Iterator[str]:
    path = parameter.split(".")[:-1]
    return (".".join(path[: end + 1]) for end in range(len(path)))
