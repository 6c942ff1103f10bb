"""Memory in an unnamed temporary file, which disappears however the process ends."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from typing import IO, Any

import torch

from bgd_plugin.errors import CalibrationError

__all__ = ["Extent", "SpillFile"]


class Extent:
    """A range of bytes in the file; it is reused once nothing refers to it, mapped memory included."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size


class _Mapping(mmap.mmap):
    """Mapped memory that keeps its extent alive."""

    extent: Extent


class SpillFile:
    """A temporary file that holds pieces of memory, created at the first write.

    Args:
        folder: where to create it; None for the system's folder for temporary files.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._free: list[tuple[int, int]] = []  # (start, size), sorted, no two adjacent
        self._end = 0
        self._used = 0
        self.peak_bytes = 0

    def write(self, memory: torch.UntypedStorage) -> Extent:
        """Copy memory to the file.

        Raises:
            CalibrationError: the file cannot be written.
        """
        extent = self._take(memory.nbytes())
        content: Any = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="bgd-plugin-", dir=self._folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(extent.start)
            left = memoryview(content.cpu().numpy())
            while left:
                left = left[self._file.write(left) :]
            self._file.truncate(self._end)  # mappings end within the file
        except OSError as error:
            raise CalibrationError(
                "calibration values beyond memory_bytes cannot be written to "
                f"{self._folder or tempfile.gettempdir()} ({error.strerror or error}): free space there, point "
                "TMPDIR to another folder, give less calibration data, or raise memory_bytes"
            ) from error
        return extent

    def read(self, extent: Extent) -> torch.UntypedStorage:
        """A copy of an extent's content, in memory."""
        copied: torch.UntypedStorage = self.map(extent).clone()  # type: ignore[no-untyped-call]
        return copied

    def map(self, extent: Extent) -> torch.UntypedStorage:
        """An extent mapped as memory; writes go to the file."""
        assert self._file is not None
        mapping = _Mapping(self._file.fileno(), extent.size, offset=extent.start)
        mapping.extent = extent
        return torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()

    def _take(self, size: int) -> Extent:
        """The first free range that is large enough, or the end of the file."""
        space = _whole_pages(size)
        for index, (start, length) in enumerate(self._free):
            if length >= space:
                self._free[index : index + 1] = [(start + space, length - space)] if length > space else []
                break
        else:
            start, self._end = self._end, self._end + space
        self._used += space
        self.peak_bytes = max(self.peak_bytes, self._used)
        extent = Extent(start, size)
        weakref.finalize(extent, self._give_back, start, space).atexit = False
        return extent

    def _give_back(self, start: int, size: int) -> None:
        self._used -= size
        merged: list[tuple[int, int]] = []
        for place in sorted([*self._free, (start, size)]):
            if merged and sum(merged[-1]) == place[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + place[1])
            else:
                merged.append(place)
        self._free = merged


def _whole_pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
