"""The fastest kernel for a layer and a number of inputs, measured at the first call and cached in a small file."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bgd_plugin.errors import BGDError
from bgd_plugin.support.atomic import write_atomically

__all__ = ["cache_file", "fastest"]

_ROUNDS = 3
_log = logging.getLogger(__name__)
_lock = threading.RLock()
_chosen: dict[tuple[Any, ...], str] = {}

Ways = Mapping[str, Callable[[], Any]]


def cache_file() -> Path:
    """The file of cached measurements: `kernels.json` in `$BGD_CACHE`, or in `bgd_plugin` in the cache folder."""
    if folder := os.environ.get("BGD_CACHE"):
        return Path(folder) / "kernels.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bgd_plugin" / "kernels.json"


def fastest(key: tuple[Any, ...], ways: Callable[[], Ways]) -> str:
    """The name of the fastest way to compute, measured once for each key, machine and version of torch.

    Args:
        key: everything on which the time depends.
        ways: returns the calls to choose from, by name; they compute the same. Called only if the file has to be read
            or the time measured.
    """
    found = _chosen.get(key)
    if found is None:
        with _lock:
            found = _chosen[key] = _kept_or_measured(str(key), ways())
    return found


def _kept_or_measured(key: str, ways: Ways) -> str:
    kept = str(_read().get(key))
    if kept not in ways:
        kept = _measure(key, ways)
        _write(key, kept)
    return kept


def _measure(key: str, ways: Ways) -> str:
    """The way with the shortest of three calls, after a warm-up; calls of the ways alternate."""
    # the CPU time of one thread does not depend on what else the machine runs
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = dict.fromkeys(ways, float("inf"))
    for number in range(_ROUNDS + 1):
        for name, call in ways.items():
            start = clock()
            call()
            if number:
                seconds[name] = min(seconds[name], clock() - start)
    winner = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {value * 1e3:.3f} ms" for name, value in seconds.items())
    _log.info("kernel for %s: %s (%s)", key, winner, times)
    return winner


@cache
def _machine() -> str:
    from llvmlite import binding

    return f"{binding.get_host_cpu_name()} x{os.cpu_count()}, torch {torch.__version__}"


def _read() -> dict[str, str]:
    """Earlier measurements on this machine; empty if the file is missing or not ours."""
    content = _content().get(_machine())
    return content if isinstance(content, dict) else {}


def _content() -> dict[str, Any]:
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home folder
        return {}
    return content if isinstance(content, dict) else {}


def _write(key: str, name: str) -> None:
    """Cache a measurement; if the folder is not writable, for this process only."""
    content = _content()
    content[_machine()] = {**_read(), key: name}
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1, sort_keys=True).encode())
    except (OSError, RuntimeError, BGDError) as error:
        _log.debug("kernel measurements are not cached: %s", error)
