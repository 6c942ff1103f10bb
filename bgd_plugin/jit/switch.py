"""Whether compiled code may run at all: `llvmlite` is installed, and it is not turned off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from bgd_plugin.jit.llvm import AVAILABLE

__all__ = ["disabled", "enabled", "turned_off"]

_is_off: ContextVar[bool] = ContextVar("bgd_kernels_off", default=False)
_is_off_by_environment = os.environ.get("BGD_KERNELS", "").strip().lower() in ("0", "off", "false", "no")


@contextmanager
def disabled() -> Iterator[None]:
    """Inside the `with` block this thread computes with torch's own operators alone.

    The environment variable `BGD_KERNELS=off`, read once at import, does the same for a whole process.
    """
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def enabled() -> bool:
    """Whether compiled code can be used: `llvmlite` is installed, and it is not turned off."""
    return AVAILABLE and not turned_off()


def turned_off() -> bool:
    """Whether the caller wants the plain path, with torch's operators alone."""
    return _is_off_by_environment or _is_off.get()
