"""Several processes on one job, through torch.distributed: sums, broadcasts from the first one, and liveness.

Outside a process group everything here is a plain call, so the rest of the library need not know about processes.

A process that dies must not leave the others waiting. While a job runs, each process writes a heartbeat to the group's
store every second. No collective here blocks: it is started, then polled, and if it takes long, the heartbeats of the
other processes are checked.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bgd_plugin.errors import BGDError, DistributedError

__all__ = [
    "from_all",
    "from_first",
    "is_first",
    "largest",
    "parallel",
    "process_group",
    "processes",
    "rank",
    "sum_",
    "synchronize_",
    "total",
    "unsynchronized",
    "watched",
]

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 15.0
_LOOK_SECONDS = 3.0

_jobs = itertools.count()
_watch: _Watch | None = None


def processes() -> int:
    """Number of processes in the job; 1 outside a process group."""
    return dist.get_world_size() if _is_on() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_on() else 0


def is_first() -> bool:
    """Whether this is the process that fits layers, writes files and logs."""
    return rank() == 0


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; bit-identical in every process."""
    if processes() > 1:
        for tensor in tensors:
            _finish(dist.all_reduce(tensor, async_op=True))


def total(value: float) -> float:
    """The sum of a number over all processes."""
    number = torch.tensor([float(value)], dtype=torch.float64, device=_device())
    sum_([number])
    return float(number)


def largest(value: int) -> int:
    """The maximum of a number over all processes."""
    number = torch.tensor([value], device=_device())
    if processes() > 1:
        _finish(dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True))
    return int(number)


def parallel(module: nn.Module) -> nn.Module:
    """Wrap a module so that each backward pass leaves the mean gradient over all processes.

    Parameters must already be equal in all processes; each process keeps its own buffers.
    """
    if processes() == 1:
        return module
    held = _Held(module)
    # buffers that torch must not exchange: backends do not support the dtype of codes, for example
    made: Any = DistributedDataParallel
    made._set_params_and_buffers_to_ignore_for_model(held, [name for name, _ in held.named_buffers()])
    return DistributedDataParallel(held)


class _Held(nn.Module):
    """A wrapper on which torch may set attributes without touching the module itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def unsynchronized(module: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients locally inside this context; the first backward pass after it exchanges them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def from_first(work: Callable[[], tuple[dict[str, Tensor], str]]) -> tuple[dict[str, Tensor], str]:
    """Call `work` in the first process only, and return its result in every process.

    The result is a mapping of CPU tensors and a text, sent as a safetensors file, so nothing is unpickled.

    Raises:
        BGDError: `work` raised one; the first process raises that error, the others a `DistributedError` with its text.
    """
    if processes() == 1:
        return work()
    content, error = b"", None
    if is_first():
        try:
            tensors, text = work()
            held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            content = safetensors.torch.save(held, metadata={"text": text})
        except BGDError as raised:
            content, error = safetensors.torch.save({}, metadata={"error": str(raised)}), raised
    content = _broadcast(content)
    if error is not None:
        raise error
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    if "error" in metadata:
        raise DistributedError(f"the first process stopped: {metadata['error']}")
    return safetensors.torch.load(content), metadata["text"]


def from_all(content: bytes) -> list[bytes]:
    """The content given by each process, in order of rank, in every process."""
    if processes() == 1:
        return [content]
    sizes = torch.zeros(processes(), dtype=torch.int64, device=_device())
    sizes[rank()] = len(content)
    sum_([sizes])
    room = max(1, int(sizes.max()))
    padded = torch.frombuffer(bytearray(content.ljust(room)), dtype=torch.uint8).to(_device())
    parts = [torch.empty_like(padded) for _ in range(processes())]
    _finish(dist.all_gather(parts, padded, async_op=True))
    return [bytes(part.cpu().numpy())[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]


@torch.no_grad()
def synchronize_(model: nn.Module) -> None:
    """Copy the first process's state to every process, bit for bit."""
    if processes() > 1:
        for tensor in model.state_dict().values():
            if tensor.numel():
                # as bytes: backends do not support every dtype, 16-bit integers for example
                moved = tensor.detach().to(_device()).contiguous().reshape(-1).view(torch.uint8)
                _finish(dist.broadcast(moved, 0, async_op=True))
                tensor.copy_(moved.view(tensor.dtype).reshape(tensor.shape))


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


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the process group that `torchrun` describes in the environment; does nothing without one.

    Yields the device of this process: with several GPUs on a machine, its own.
    """
    if _is_on() or not (dist.is_available() and dist.is_torchelastic_launched()):
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


def _is_on() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """The device on which the group's backend expects tensors."""
    nccl = _is_on() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _broadcast(content: bytes) -> bytes:
    length = torch.tensor([len(content)], device=_device())
    _finish(dist.broadcast(length, 0, async_op=True))
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if is_first():
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    buffer = buffer.to(_device())
    _finish(dist.broadcast(buffer, 0, async_op=True))
    return bytes(buffer.cpu().numpy())


def _finish(work: Any) -> None:
    """Wait for a collective that was started, and check on the other processes meanwhile."""
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
