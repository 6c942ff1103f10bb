"""Notice that another process of the job has died, rather than wait for it.

While a job runs, each process writes a heartbeat to the group's store every second. No collective blocks: it is
started, then polled, and if it takes long, the heartbeats of the other processes are checked.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from bgd_plugin.errors import DistributedError
from bgd_plugin.support.group import processes, rank

__all__ = ["finish", "watched"]

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 15.0
_LOOK_SECONDS = 3.0

_jobs = itertools.count()
_watch: _Watch | None = None


@contextmanager
def watched() -> Iterator[None]:
    """Watch the other processes during this context, and notify them if it fails.

    Raises:
        DistributedError: another process stopped; the message names it.
    """
    global _watch
    if processes() == 1:
        yield
        return
    _watch = _Watch(dist.distributed_c10d._get_default_store(), next(_jobs))
    try:
        yield
    except DistributedError:
        raise
    except BaseException as error:
        lost = _watch.missing(patiently=True) if _is_of_communication(error) else ""
        if lost:
            raise DistributedError(lost) from error
        _watch.say(f"{type(error).__name__}: {error}")
        raise
    finally:
        _watch.stop()
        _watch = None


def finish(work: Any) -> None:
    """Wait for a collective, and check on the other processes meanwhile.

    Args:
        work: the handle that an asynchronous collective of `torch.distributed` returns.

    Raises:
        DistributedError: another process stopped responding.
    """
    began = looked = time.monotonic()
    while not work.is_completed():
        now = time.monotonic()
        time.sleep(0.0002 if now - began < 0.1 else 0.005)
        if _watch is not None and now - looked > _LOOK_SECONDS:
            looked = now
            lost = _watch.missing(patiently=False)
            if lost:
                raise DistributedError(lost)
    work.wait()


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error comes from a connection, which breaks when the process at the other end dies."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection", "store"))
    )


class _Watch:
    """Heartbeats: one counter per process in the group's store.

    Args:
        store: the process group's store.
        job: a number that is equal in all processes and new for each job.
    """

    def __init__(self, store: Any, job: int) -> None:
        self._store, self._job = store, job
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._store.set(self._key(rank()), "0")
        self._thread = threading.Thread(target=self._beat, name="bgd-plugin heartbeat", daemon=True)
        self._thread.start()

    def say(self, message: str) -> None:
        """Tell the other processes, which may be waiting, that this one stopped."""
        try:
            self._store.set(self._key("failed"), f"process {rank()} stopped: {message}")
        except RuntimeError:  # the store's host is gone, so the others notice anyway
            return

    def stop(self) -> None:
        """Stop the heartbeat."""
        self._ended.set()
        self._thread.join(timeout=2 * _BEAT_SECONDS)

    def missing(self, *, patiently: bool) -> str:
        """A message that names the processes that stopped; empty if all are alive.

        Args:
            patiently: a failure is known to have happened: wait until the process that failed is known.
        """
        end = time.monotonic() + (_SILENT_SECONDS + 5 * _BEAT_SECONDS if patiently else 0.0)
        while True:
            try:
                found = self._look(4 * _BEAT_SECONDS if patiently else _SILENT_SECONDS)
            except RuntimeError as error:
                return f"process 0, or the machine that keeps the group's store, is gone ({_first_line(error)})"
            if found or time.monotonic() >= end:
                return found
            time.sleep(_BEAT_SECONDS / 2)

    def _look(self, silent_seconds: float) -> str:
        if self._store.check([self._key("failed")]):
            return str(self._store.get(self._key("failed")).decode())
        now = time.monotonic()
        lost = []
        for other in range(processes()):
            key = self._key(other)
            value = self._store.get(key) if self._store.check([key]) else b""
            before, since = self._seen.get(other, (None, now))
            if value != before:
                self._seen[other] = (value, now)
            elif other != rank() and now - since > silent_seconds:
                lost.append(str(other))
        if not lost:
            return ""
        who = f"process {lost[0]}" if len(lost) == 1 else f"processes {', '.join(lost)}"
        return f"{who} stopped responding: killed, out of memory, or the machine is down"

    def _beat(self) -> None:
        for count in itertools.count(1):
            if self._ended.wait(_BEAT_SECONDS):
                return
            try:
                self._store.set(self._key(rank()), str(count))
            except RuntimeError:  # the store is gone; the next collective reports it
                return

    def _key(self, name: object) -> str:
        return f"bgd-plugin/{self._job}/{name}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
