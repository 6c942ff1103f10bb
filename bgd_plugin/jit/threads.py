"""Distribute rows over threads, as many as torch may use."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bgd_plugin.jit.openmp import run_calls, run_team, runtime

__all__ = ["BOTH", "FIRST", "SECOND", "pays", "run_parts", "share_rows"]

Call = tuple[int, ...]
"""The arguments of one call of a compiled function."""

_CODES_PER_THREAD = 1 << 15
"""Number of codes below which another thread costs more time than it saves: some 10 µs of work."""

FIRST, SECOND, BOTH = 1, 2, 3
"""Steps of a function for `run_parts`."""

_pool: ThreadPoolExecutor | None = None
_is_forked = False
_lock = threading.Lock()


def pays(rows: int, blocks: int) -> bool:
    """Whether there is work for another thread: enough codes for two of them.

    Args:
        rows: number of rows of the codes.
        blocks: number of codes in a row.
    """
    return rows > 1 and rows * blocks >= 2 * _CODES_PER_THREAD


def share_rows(rows: int, blocks: int, program: Any, calls: Callable[[int, int], Sequence[Call]]) -> None:
    """Call a compiled function for all rows, on up to `torch.get_num_threads()` threads.

    They are the threads of torch's own operators; where its runtime cannot be called, or the process was forked, which
    ends them, they are threads of ours.

    Args:
        rows: number of rows of the codes.
        blocks: number of codes in a row.
        program: the function (`llvm.compiled`).
        calls: from `first` and `last` to the calls, always as many, that write the outputs of these rows alone. The
            memory that they use must be held by somebody else until `share_rows` returns.
    """
    shares = min(rows * blocks // _CODES_PER_THREAD, rows)
    threads = torch.get_num_threads() if shares > 1 else 1
    shares = min(shares, threads)
    if shares <= 1:
        _run(program, calls(0, rows))
        return
    bounds = [rows * i // shares for i in range(shares + 1)]
    parts = [calls(*pair) for pair in itertools.pairwise(bounds)]
    own = None if _is_forked else runtime()
    if own is not None:
        run_calls(own, program, parts, threads)
    else:
        _run_on_our_threads(program, parts)


def run_parts(program: Any, data: int, threads: int) -> None:
    """Call a compiled function for all parts of some work, each on a thread, as `share_rows` does.

    Args:
        program: the function. It takes `data`, the part's index, the number of parts, and the steps to do: `FIRST`,
            `SECOND`, or `BOTH` with a barrier of the runtime between them.
        data: the address of what the function reads and writes, 64-bit integers.
        threads: number of parts.
    """
    if threads == 1:
        program(data, 0, 1, BOTH)
        return
    own = None if _is_forked else runtime()
    if own is not None:
        run_team(own, program, data, threads, BOTH)
        return
    for step in (FIRST, SECOND):
        _run_on_our_threads(program, [[(data, part, threads, step)] for part in range(threads)])


def _run(program: Any, calls: Sequence[Call]) -> None:
    for call in calls:
        program(*call)


def _run_on_our_threads(program: Any, parts: list[Sequence[Call]]) -> None:
    pool = _workers()
    others = [pool.submit(_run, program, part) for part in parts[1:]]
    _run(program, parts[0])
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
    global _pool, _lock, _is_forked
    _pool, _lock, _is_forked = None, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
