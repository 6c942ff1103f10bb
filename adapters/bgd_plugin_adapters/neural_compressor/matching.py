"""The layers to which a name in a config applies."""

from __future__ import annotations

import re

__all__ = ["matches"]


def matches(pattern: str, names: list[str]) -> set[str]:
    """The layers to which a name applies.

    neural-compressor matches every name as a regular expression at the beginning of layers' names, so `layer1` would
    also match `layer10`. Here the whole name of a layer selects that layer, and the name of a module the layers in it;
    only other names are matched as in neural-compressor.

    Args:
        pattern: the name in a config.
        names: of all layers.
    """
    within = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
    return within or {name for name in names if re.match(pattern, name)}
