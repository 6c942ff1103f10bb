"""Several processes on one job, through torch.distributed: sums, broadcasts from the first one, shared gradients.

Outside a process group everything here is a plain call, so the rest of the library need not know about processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bgd_plugin.errors import BGDError, DistributedError
from bgd_plugin.support.group import by_itself, group_device, is_first, process_group, processes, rank
from bgd_plugin.support.heartbeat import finish, watched

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


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; bit-identical in every process.

    Args:
        tensors: of the same shapes in every process.
    """
    if processes() > 1:
        for tensor in tensors:
            finish(dist.all_reduce(tensor, async_op=True))


def total(value: float) -> float:
    """The sum of a value over all processes."""
    number = torch.tensor([float(value)], dtype=torch.float64, device=group_device())
    sum_([number])
    return float(number)


def largest(value: int) -> int:
    """The maximum of a value over all processes."""
    number = torch.tensor([value], device=group_device())
    if processes() > 1:
        finish(dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True))
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
    """Call `work` in the first process only, and return its result in every process; sums inside are its own.

    The result is a mapping of CPU tensors of any shape and a text, sent as a safetensors file: nothing is unpickled.

    Raises:
        BGDError: `work` raised one; the first process raises that error, the others a `DistributedError` with its text.
    """
    if processes() == 1:
        return work()
    content, error = b"", None
    if is_first():
        try:
            with by_itself():
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
    sizes = torch.zeros(processes(), dtype=torch.int64, device=group_device())
    sizes[rank()] = len(content)
    sum_([sizes])
    room = max(1, int(sizes.max()))
    padded = torch.frombuffer(bytearray(content.ljust(room)), dtype=torch.uint8).to(group_device())
    parts = [torch.empty_like(padded) for _ in range(processes())]
    finish(dist.all_gather(parts, padded, async_op=True))
    return [bytes(part.cpu().numpy())[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]


@torch.no_grad()
def synchronize_(model: nn.Module) -> None:
    """Copy the first process's state to every process, bit for bit."""
    if processes() > 1:
        for tensor in model.state_dict().values():
            if tensor.numel():
                # as bytes: backends do not support every dtype, 16-bit integers for example
                moved = tensor.detach().to(group_device()).contiguous().reshape(-1).view(torch.uint8)
                finish(dist.broadcast(moved, 0, async_op=True))
                tensor.copy_(moved.view(tensor.dtype).reshape(tensor.shape))


def _broadcast(content: bytes) -> bytes:
    length = torch.tensor([len(content)], device=group_device())
    finish(dist.broadcast(length, 0, async_op=True))
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if is_first():
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    buffer = buffer.to(group_device())
    finish(dist.broadcast(buffer, 0, async_op=True))
    return bytes(buffer.cpu().numpy())
