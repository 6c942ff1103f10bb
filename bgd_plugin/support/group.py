"""The process group of torch.distributed that a job runs in, if it runs in one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["group_device", "is_first", "is_on", "process_group", "processes", "rank"]


def is_on() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def group_device() -> torch.device:
    """The device on which the group's backend expects tensors."""
    nccl = is_on() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def processes() -> int:
    """Number of processes in the job; 1 outside a process group."""
    return dist.get_world_size() if is_on() else 1


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
