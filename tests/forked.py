"""The processes of a test's job, forked from one that has imported torch and the jobs, which takes longer than a job.

Tests that use them belong to the group "processes" of pytest-xdist, so that there is one such process.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

__all__ = ["exit_codes", "forked"]

_PRELOADED = ["tests.distributed_job", "tests.wrappers_job"]


def forked(target: Callable[..., None], *arguments: object, processes: int = 2) -> list[Any]:
    """Start processes that call `target(arguments)` with the variables in the environment that torchrun sets."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    job = [context.Process(target=_run, args=(common | rank, target, arguments), daemon=True) for rank in ranks]
    for process in job:
        process.start()
    return job


def _run(environment: dict[str, str], target: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    target(*arguments)


def exit_codes(job: list[Any]) -> list[int]:
    """Exit codes of a job's processes; once one has failed, the others are ended, as torchrun does it."""
    end = time.monotonic() + 300
    while any(process.is_alive() for process in job) and time.monotonic() < end:
        if any(process.exitcode for process in job):
            break
        time.sleep(0.02)
    for process in job:
        process.kill()
        process.join()
    return [process.exitcode for process in job]
