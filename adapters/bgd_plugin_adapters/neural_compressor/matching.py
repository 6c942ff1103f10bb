"""Which layers a name in a config means."""

from __future__ import annotations

import re

__all__ = ["matches"]


def matches(pattern: str, names: list[str]) -> set[str]:
    """The layers that a name means.

    neural-compressor takes every name as the beginning of a regular expression, so that `layer1` would also mean
    `layer10`. Here a whole name means that layer, the name of a module that holds layers means those, and only what is
    neither is taken as neural-compressor does.
    """
    within = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
    return within or {name for name in names if re.match(pattern, name)}
