"""The result of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["Exported", "Run"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an exported file in its runtime.

    Attributes:
        outputs: the tensors that it returned, in the order of the network's outputs.
        is_folded: whether all weights were decoded once, when the file was loaded; None: the runtime does not say.
        runtime: name and version.
    """

    outputs: tuple[Tensor, ...]
    is_folded: bool | None
    runtime: str


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported file; `str()` is the lines that the command line prints.

    Attributes:
        path: of the file or package.
        size_bytes: of the file, or of all files of a package.
        file_bytes: of this library's own file of the network, as `bgd_plugin.save` would write it.
        packed_bytes: the same with all codes packed, as they are exported; more than `file_bytes` where that file has
            entropy-coded codes.
        largest_difference: between the runtime's outputs and the network's, relative to the range of each output;
            None if no runtime on this machine runs the file.
        is_folded: whether the runtime decodes the weights once, when it loads the file; None if unknown.
        runtime: name and version of the runtime that ran the file; empty if none did.
        notes: further remarks, in sentences.
    """

    path: Path
    size_bytes: int
    file_bytes: int
    packed_bytes: int
    largest_difference: float | None
    is_folded: bool | None
    runtime: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        ratio = f"{self.size_bytes / self.file_bytes:.2f} times the {self.file_bytes:,} of the .safetensors file"
        lines = [f"{self.path}: {self.size_bytes:,} bytes, {ratio}"]
        if self.file_bytes < self.packed_bytes:
            lines.append(
                "the .safetensors file has entropy-coded codes, which no other runtime decodes; exported codes are "
                f"packed ({self.packed_bytes:,} bytes in our format)"
            )
        if self.largest_difference is not None:
            lines.append(f"{self.runtime}: largest difference {self.largest_difference:.1e} of the output's range")
        if self.is_folded is not None:
            how = "decodes the weights once, at load" if self.is_folded else "decodes weights at each run"
            lines.append(f"{self.runtime}: {how}")
        return "\n".join((*lines, *self.notes))
