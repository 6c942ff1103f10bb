"""Find and load the adapters that put this library into other frameworks."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from bgd_plugin.errors import BGDError

__all__ = ["adapter_names", "load_adapter"]

_GROUP = "bgd_plugin.adapters"


def adapter_names() -> tuple[str, ...]:
    """Names of the adapters that are installed."""
    return tuple(sorted({point.name for point in metadata.entry_points(group=_GROUP)}))


def load_adapter(name: str) -> Any:
    """Import an adapter and register it with its framework; a second call does nothing more.

    Raises:
        BGDError: no adapter of that name, or its framework cannot be imported.
    """
    points = {point.name: point for point in metadata.entry_points(group=_GROUP)}
    if name not in points:
        existing = ", ".join(sorted(points)) or "none"
        raise BGDError(f"there is no adapter {name!r}; installed adapters: {existing}")
    try:
        module = points[name].load()
    except ImportError as error:
        extra = name.replace("_", "-")
        raise BGDError(f"adapter {name!r} cannot be imported ({error}): pip install 'bgd-plugin[{extra}]'") from error
    module.register()
    return module
