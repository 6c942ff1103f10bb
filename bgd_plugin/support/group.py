"""The process group of torch.distributed that a job runs in, if it runs in one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist

__all__ = ["by_itself", "group_device", "is_first", "is_on", "process_group", "processes", "rank"]

_is_by_itself: ContextVar[bool] = ContextVar("bgd_plugin_is_by_itself", default=False)


def is_on() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def group_device() -> torch.device:
    """The device on which the group's backend expects tensors."""
    nccl = is_on() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def processes() -> int:
    """Number of processes that work on this together; 1 outside a process group, and `by_itself`."""
    return dist.get_world_size() if is_on() and not _is_by_itself.get() else 1


@contextmanager
def by_itself() -> Iterator[None]:
    """Inside, this process's sums are its own: it does not wait for the others, which are not there."""
    token = _is_by_itself.set(True)
    try:
        yield
    finally:
        _is_by_itself.reset(token)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if is_on() else 0


def is_first() -> bool:
    """Whether this is the process that fits layers, writes files and logs."""
    return rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the process group that `torchrun` describes in the environment; does nothing without one.

    Yields the device of this process: with several GPUs on a machine, its own.
    """
    if is_on() or not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(minutes=30))
    try:
        yield device
    finally:
        dist.destroy_process_group()
