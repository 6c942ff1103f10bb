"""Several processes on one job, on torch.distributed: sums over all of them, one that decides, and who is missing.

Outside a process group everything here is a plain call, so the rest of the library need not know of processes.

A process that dies must not leave the others waiting. While a job runs, each process writes a sign of life to the
group's store every second. No collective here blocks: it is started, then polled, and while it takes long the signs of
the others are read.
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
    """How many processes work on the job."""
    return dist.get_world_size() if _is_on() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_on() else 0


def is_first() -> bool:
    """Whether this is the process that fits, writes files, and speaks."""
    return rank() == 0


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; the same bits everywhere."""
    if processes() > 1:
        for tensor in tensors:
            _finish(dist.all_reduce(tensor, async_op=True))


def total(value: float) -> float:
    """The sum of a number over all processes."""
    number = torch.tensor([float(value)], dtype=torch.float64, device=_device())
    sum_([number])
    return float(number)


def largest(value: int) -> int:
    """The largest of a number over all processes."""
    number = torch.tensor([value], device=_device())
    if processes() > 1:
        _finish(dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True))
    return int(number)


def parallel(module: nn.Module) -> nn.Module:
    """The module such that each backward pass leaves the mean of all processes' gradients.

    Parameters are the same in all processes already; buffers stay each process's own.
    """
    if processes() == 1:
        return module
    held = _Held(module)
    # buffers that torch is not to exchange: codes, for one, are of a dtype that backends do not know
    made: Any = DistributedDataParallel
    made._set_params_and_buffers_to_ignore_for_model(held, [name for name, _ in held.named_buffers()])
    return DistributedDataParallel(held)


class _Held(nn.Module):
    """A module within another one, which torch may mark without leaving a mark on the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def unsynchronized(module: nn.Module) -> AbstractContextManager[None]:
    """Backward passes within are added up in each process; the first one after it exchanges them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def from_first(work: Callable[[], tuple[dict[str, Tensor], str]]) -> tuple[dict[str, Tensor], str]:
    """What `work` gives in the first process, in all of them; only the first one calls it.

    Tensors come on the CPU, beside a text; both travel as a safetensors file, so nothing is unpickled.

    Raises:
        BGDError: `work` raised one in the first process; there it is the error itself, elsewhere its text.
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
    """What each process gives, in all of them, in the order of their numbers."""
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
    """Give every process the first one's state, bit by bit."""
    if processes() > 1:
        for tensor in model.state_dict().values():
            if tensor.numel():
                # as bytes: backends do not know every dtype, 16-bit integers for one
                moved = tensor.detach().to(_device()).contiguous().reshape(-1).view(torch.uint8)
                _finish(dist.broadcast(moved, 0, async_op=True))
                tensor.copy_(moved.view(tensor.dtype).reshape(tensor.shape))


@contextmanager
def watched() -> Iterator[None]:
    """Watch the other processes while the block runs, and tell them if it fails.

    Raises:
        DistributedError: another process is gone; it is named.
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
    """A process group as `torchrun` describes it in the environment; nothing without one.

    Gives the device for this process: of several GPUs on a machine, its own.
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
    """Where the group's backend wants its tensors."""
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
    """Wait for a collective that was started, with an eye on the other processes."""
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
    """Whether an error comes of a connection, which breaks when a process at its other end dies."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection", "store"))
    )


class _Watch:
    """Signs of life, one counter for each process, in the group's store.

    Args:
        store: of the process group.
        job: a number that is the same in all processes, and new for each job.
    """

    def __init__(self, store: Any, job: int) -> None:
        self._store, self._job = store, job
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._store.set(self._key(rank()), "0")
        self._thread = threading.Thread(target=self._beat, name="bgd-plugin signs of life", daemon=True)
        self._thread.start()

    def say(self, message: str) -> None:
        """Tell the others, who may be waiting, that this process gives up."""
        try:
            self._store.set(self._key("failed"), f"process {rank()} stopped: {message}")
        except RuntimeError:  # the store is gone, and with it whoever kept it: they know
            return

    def stop(self) -> None:
        """No more signs of life."""
        self._ended.set()
        self._thread.join(timeout=2 * _BEAT_SECONDS)

    def missing(self, *, patiently: bool) -> str:
        """Which processes have stopped, in words; empty if all live.

        Args:
            patiently: something is known to be wrong: wait until it shows who it is.
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
        who = f"process {lost[0]} gives" if len(lost) == 1 else f"processes {', '.join(lost)} give"
        return f"{who} no sign of life any more: killed, out of memory, or its machine is gone"

    def _beat(self) -> None:
        for count in itertools.count(1):
            if self._ended.wait(_BEAT_SECONDS):
                return
            try:
                self._store.set(self._key(rank()), str(count))
            except RuntimeError:  # the store is gone; the next collective says so
                return

    def _key(self, name: object) -> str:
        return f"bgd-plugin/{self._job}/{name}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
