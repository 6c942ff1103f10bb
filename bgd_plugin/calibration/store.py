"""Values held per calibration batch, within a memory bound; beyond it, batches are moved to a file.

The values of a batch are a tree of tensors that may share memory, and that a network may modify in place. So the
storage under a tensor is moved between memory and file, not the tensor: views stay views, and aliases stay aliases. A
batch on file is mapped, not read: only the pages that a node touches are loaded, and in-place writes go to the file.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.spill import Extent, SpillFile
from bgd_plugin.calibration.trees import leaves, mapped

__all__ = ["DEFAULT_BOUND_BYTES", "BatchStore", "Shelf", "give_back_memory", "memory_of"]

DEFAULT_BOUND_BYTES = 1 << 29
"""Default limit of the values held in memory: 512 MiB."""

_TRIMMED_BYTES = 1 << 26, 1 << 30
"""Values moved to the file, at least and at most, until the memory that they took is given back to the system.

Between these, half of the bound: memory that is given back costs time when it is used again.
"""


@dataclass(frozen=True, eq=False)
class _OnFile:
    """A tensor whose storage is in the file."""

    extent: Extent
    device: torch.device
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass
class _Item:
    """A batch: its content, with tensors or with placeholders for tensors on file, and its size in bytes.

    `mapped` holds the mapped file memory that tensors of the content use, by address.
    """

    content: dict[str, Any]
    bytes: int = 0
    is_spilled: bool = False
    mapped: dict[int, tuple[Extent, torch.UntypedStorage]] = field(default_factory=dict)


class BatchStore:
    """The content of each batch: a mapping that the code that opens the batch may change.

    One batch is open at a time; opening another one closes it. Half of the bound is for closed batches in memory, the
    other half for work on the open one. A batch that does not fit is spilled when it closes: batches are visited in
    turn, so it is the one needed last. It returns to memory as soon as there is room.

    Args:
        bound_bytes: limit in bytes; None holds everything in memory.
        folder: folder of the file; None for the system's folder for temporary files.
    """

    def __init__(self, bound_bytes: int | None = None, folder: str | None = None) -> None:
        self.bound_bytes = bound_bytes
        self._file = SpillFile(folder)
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._resident_bytes = 0  # of the closed batches
        self._moved_bytes = 0  # to the file, since memory was last given back
        self._trimmed_bytes = min(max((bound_bytes or 0) // 2, _TRIMMED_BYTES[0]), _TRIMMED_BYTES[1])
        self._exempt: dict[str, set[int]] = {}
        self._numbers = itertools.count()
        self._ended: list[str] = []
        self.peak_bytes = 0

    @property
    def spilled_bytes(self) -> int:
        """The maximum size of the file so far, in bytes."""
        return self._file.peak_bytes

    def __len__(self) -> int:
        return len(self._items)

    def claim(self, owner: object, networks: Sequence[nn.Module]) -> str:
        """A unique prefix for the names under which a walk keeps values in the content of batches.

        No other walk gets the same one, so two walks over one set of batches cannot overwrite each other's values.
        Values under the prefix are dropped when the owner is garbage-collected.

        Args:
            owner: the walk.
            networks: the networks it runs. Their own tensors, which values may share, are neither counted nor spilled.
        """
        prefix = f"walk {next(self._numbers)} "
        tensors = (t for module in networks for t in (*module.parameters(), *module.buffers()))
        self._exempt[prefix] = {memory_of(t).data_ptr() for t in tensors}
        # not dropped right away: the owner may be collected while a batch is being moved
        weakref.finalize(owner, self._ended.append, prefix).atexit = False
        return prefix

    def _drop_ended(self) -> None:
        while self._ended:
            prefix = self._ended.pop()
            del self._exempt[prefix]
            for item in self._items:
                names = [name for name in item.content if name.startswith(prefix)]
                for name in names:
                    del item.content[name]
                if names and item is not self._open and not item.is_spilled and self.bound_bytes is not None:
                    self._resident_bytes -= item.bytes
                    item.bytes = self._bytes(item)
                    self._resident_bytes += item.bytes

    def _bytes(self, item: _Item) -> int:
        return _size(self._memories(item.content))

    def append(self, content: dict[str, Any]) -> None:
        """Add a batch with this content, and open it."""
        self._close()
        self._items.append(_Item(content))
        self._open = self._items[-1]

    def open(self, index: int) -> dict[str, Any]:
        """Open the batch at this index; returns its content, valid until another batch is opened."""
        self._drop_ended()
        item = self._items[index]
        if item is not self._open:
            self._close()
            self._resident_bytes -= 0 if item.is_spilled else item.bytes
            if item.is_spilled:
                self._load(item)
            self._open = item
        return item.content

    def remove(self, indices: Sequence[int]) -> None:
        """Drop the batches at these indices, with their content."""
        self._close()
        gone = set(indices)
        self._resident_bytes -= sum(self._items[i].bytes for i in gone if not self._items[i].is_spilled)
        self._items = [item for index, item in enumerate(self._items) if index not in gone]

    def _close(self) -> None:
        item, self._open = self._open, None
        if item is None or self.bound_bytes is None:
            return
        memories = self._memories(item.content)
        item.bytes = _size(memories)
        self.peak_bytes = max(self.peak_bytes, self._resident_bytes + item.bytes)
        if self._fits(item) and not item.mapped:
            self._resident_bytes += item.bytes
        else:
            self._moved_bytes += self._spill(item, memories)
            if self._moved_bytes >= self._trimmed_bytes:  # it takes a millisecond
                self._moved_bytes = 0
                give_back_memory()

    def _fits(self, item: _Item) -> bool:
        return self.bound_bytes is None or 2 * (self._resident_bytes + item.bytes) <= self.bound_bytes

    def _memories(self, content: dict[str, Any]) -> dict[int, torch.UntypedStorage]:
        """The storages of the content's tensors, each once, by address."""
        found = [memory_of(t) for t in leaves(content) if _can_move(t)]
        memories = {memory.data_ptr(): memory for memory in found}
        exempt = set().union(*self._exempt.values())
        return {address: memory for address, memory in memories.items() if address not in exempt and address}

    def _spill(self, item: _Item, memories: dict[int, torch.UntypedStorage]) -> int:
        """Move a batch to the file, where parts of it may lie already; returns the bytes that this frees in memory."""
        extents = {address: extent for address, (extent, _) in item.mapped.items()}
        new = {address: memory for address, memory in memories.items() if address not in extents}
        for address, memory in new.items():
            extents[address] = self._file.write(memory)
        moved: dict[int, _OnFile] = {}

        def out(t: Any) -> Any:
            if not _can_move(t) or memory_of(t).data_ptr() not in memories:
                return t
            if id(t) not in moved:
                extent = extents[memory_of(t).data_ptr()]
                moved[id(t)] = _OnFile(extent, t.device, t.dtype, t.storage_offset(), t.shape, t.stride())
            return moved[id(t)]

        item.content = mapped(out, item.content)
        item.mapped = {}
        item.is_spilled = True
        return _size(new)

    def _load(self, item: _Item) -> None:
        """Load into memory if there is room; otherwise map."""
        is_mapped = not self._fits(item)
        memories: dict[int, torch.UntypedStorage] = {}
        moved: dict[int, Tensor] = {}

        def back(ref: Any) -> Any:
            if not isinstance(ref, _OnFile):
                return ref
            key = id(ref.extent)
            if key not in memories:
                memory = self._file.map(ref.extent) if is_mapped else self._file.read(ref.extent)
                if is_mapped and ref.device.type == "cpu":
                    item.mapped[memory.data_ptr()] = (ref.extent, memory)
                memories[key] = memory if ref.device.type == "cpu" else memory.to(device=ref.device)
            if id(ref) not in moved:
                empty = torch.empty(0, dtype=ref.dtype, device=ref.device)
                moved[id(ref)] = empty.set_(memories[key], ref.offset, ref.shape, ref.stride)
            return moved[id(ref)]

        # keep the old content until everything is moved: tensors are recognized by their identity
        item.content = mapped(back, item.content)
        item.is_spilled = False


class Shelf(Sequence[Any]):
    """One entry of the content of each batch, as a sequence over the batches; reading an element opens its batch."""

    def __init__(self, store: BatchStore, name: str) -> None:
        self._store, self._name = store, name

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        return self._store.open(index)[self._name]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def memory_of(tensor: Tensor) -> torch.UntypedStorage:
    """The storage of a tensor of any shape."""
    return tensor.untyped_storage()


def _size(memories: dict[int, torch.UntypedStorage]) -> int:
    return sum(memory.nbytes() for memory in memories.values())


def give_back_memory() -> None:
    """Return freed memory to the system, which the C library (glibc) would otherwise keep in fragments."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _can_move(value: Any) -> bool:
    """Whether a value is a tensor fully described by storage, offset and strides."""
    return (
        type(value) is Tensor and value.layout == torch.strided and not value.requires_grad and not value.is_quantized
    )
