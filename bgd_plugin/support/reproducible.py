"""Results that do not depend on the number of threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

__all__ = ["if_asked", "reproducible"]

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def reproducible() -> Iterator[None]:
    """Compute on one thread with torch's deterministic algorithms; both settings are restored afterwards.

    Sums over many numbers are split among threads, and a floating-point sum depends on where it is split. A change in
    the last bits is enough to select another codeword here and there, and each layer is fitted to the outputs of the
    layers before it.
    """
    threads = torch.get_num_threads()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_num_threads(threads)


def if_asked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run the function inside `reproducible()` if it is called with `reproducible=True`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kwargs.get("reproducible"):
            return function(*args, **kwargs)
        with reproducible():
            return function(*args, **kwargs)

    return wrapped
