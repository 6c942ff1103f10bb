"""Distribute rows over our own threads, as many as torch may use."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["share_rows"]

_CODES_PER_THREAD = 1 << 17
"""Number of codes below which another thread costs more time than it saves: about 50 µs of work."""

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def share_rows(rows: int, blocks: int, work: Callable[[int, int], object]) -> None:
    """Call `work(first, last)` for all rows, on up to `torch.get_num_threads()` threads.

    Args:
        rows: number of rows of the codes.
        blocks: number of codes in a row.
        work: writes only the outputs of rows `first` to `last`, and holds Python's global lock only briefly.
    """
    shares = min(rows * blocks // _CODES_PER_THREAD, rows)
    if shares > 1:
        shares = min(shares, torch.get_num_threads())
    if shares <= 1:
        work(0, rows)
        return
    bounds = [rows * i // shares for i in range(shares + 1)]
    pool = _workers()
    others = [pool.submit(work, *pair) for pair in itertools.pairwise(bounds[1:])]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


def _workers() -> ThreadPoolExecutor:
    """The process's threads; they are started at first use, and idle in between."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="bgd-kernels")
        return _pool


def _forget() -> None:
    """Start afresh in a forked process: it has none of its parent's threads, and may have a lock that stays locked."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
