"""The plan: its layers and totals."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bgd_plugin.errors import ConfigError
from bgd_plugin.pq.forms import BLOCKS, TRELLIS, Sizes
from bgd_plugin.pq.windows import code_bytes_per_column
from bgd_plugin.support.charts import line_chart
from bgd_plugin.support.tables import mib, table

__all__ = ["CurvePoint", "Plan", "PlannedLayer", "SkippedLayer", "curve_chart"]


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer that will be quantized.

    Attributes:
        name: the layer's name.
        target: path of the module that is replaced.
        kind: as of `FoundLayer`.
        family: whose setting of `BGDConfig` applied.
        weight_shape: `[C_out, C_in / groups, *kernel]` or `[C_out, C_in]`; of a transposed convolution that of the
            matrix that is cut into blocks, `[C_out · kernel, C_in / groups]`.
        block_size, codebook_size: as they will be, after the bounds of the layer.
        calls: names of the graph nodes that compute with it.
        codebook_storage: "int8" or "float16".
        mask_form, mask_bytes: how the positions of preserved zeros are stored (`bgd_plugin.encoding.masks`), and their
            bytes; "" and 0 where there are none.
        note: deviations from the setting, with reasons; empty if there are none.
        codes: "blocks", or "entropy" where the file holds the codes as an entropy-coded stream: blocks are single
            weights then, and `codebook_size` is the most that the fit may take. "trellis": two bits for each weight, a
            scale for each row; `codebook_size` is that of the table that all layers share.
        size_bytes: of an entropy-coded layer, the most that stream and codebook take in the file; 0 for others.
    """

    name: str
    target: str
    kind: str
    family: str
    weight_shape: tuple[int, ...]
    block_size: int
    codebook_size: int
    calls: tuple[str, ...]
    codebook_storage: str = "float16"
    mask_form: str = ""
    mask_bytes: int = 0
    note: str = ""
    codes: str = "blocks"
    size_bytes: int = 0

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.weight_shape[0]

    @property
    def form(self) -> str:
        """The form of the codes in memory (`pq.forms`)."""
        return TRELLIS if self.codes == TRELLIS else BLOCKS

    def sizes(self, codebook_size: int) -> Sizes:
        """What the shapes of its tensors follow from.

        Args:
            codebook_size: number of codewords.

        Returns:
            the sizes.
        """
        return Sizes(rows=self.rows, columns=self.columns, block_size=self.block_size, codebook_size=codebook_size)

    @property
    def columns(self) -> int:
        """Weights in a row."""
        return self.weights // self.rows

    @property
    def paper_bits(self) -> int:
        """Bits of codes and codebook, in half precision, by the paper's accounting; a mask counts what it takes."""
        if self.codes == TRELLIS:
            return 8 * self.columns * code_bytes_per_column(self.rows) + 16 * self.rows + 8 * self.mask_bytes
        codes = self.rows * self.blocks_per_row * self.code_bits
        return codes + 16 * self.codebook_size * self.block_size + 8 * self.mask_bytes

    @property
    def blocks_per_row(self) -> int:
        """Number of blocks in a row."""
        return self.weights // self.rows // self.block_size

    @property
    def code_bits(self) -> int:
        """Bits per code."""
        return max(1, math.ceil(math.log2(self.codebook_size)))

    @property
    def compressed_bytes(self) -> int:
        """Bytes of codes, codebook (8 bits with a 4-byte scale, or half precision) and mask in the file."""
        if self.codes == "entropy":
            return self.size_bytes
        if self.codes == TRELLIS:
            return self.columns * code_bytes_per_column(self.rows) + 2 * self.rows + self.mask_bytes
        codes = -(-self.rows * self.blocks_per_row * self.code_bits // 8)
        values = self.codebook_size * self.block_size
        return codes + (values + 4 if self.codebook_storage == "int8" else 2 * values) + self.mask_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes (whole bytes), codebook (single precision) and mask (one byte a weight) in memory."""
        mask_bytes = self.weights if self.mask_form else 0
        if self.codes == TRELLIS:
            return self.columns * code_bytes_per_column(self.rows) + 4 * self.rows + mask_bytes
        code_bytes = 1 if self.codebook_size <= 256 else 4
        return code_bytes * self.rows * self.blocks_per_row + 4 * self.codebook_size * self.block_size + mask_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, codebook and mask per weight."""
        return 8 * self.compressed_bytes / self.weights

    def kept(self, weight: Tensor) -> Tensor | None:
        """The mask of weights that may differ from zero after decoding.

        Args:
            weight: the layer's float weight, any shape.

        Returns:
            bool of the weight's shape; None if zeros are not preserved.
        """
        return weight.detach() != 0 if self.mask_form else None


@dataclass(frozen=True, kw_only=True)
class SkippedLayer:
    """A layer that stays float: its name and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A point of the curve: `file_bytes`, and the `expected_divergence` (nats) of a file of that length."""

    file_bytes: int
    expected_divergence: float


def curve_chart(curve: Sequence[CurvePoint], chosen: tuple[int, float] | None) -> str:
    """A curve as an `<svg>` element, with a mark at `chosen`, the bytes and the divergence (nats) of one file."""
    return line_chart(
        [(point.file_bytes, point.expected_divergence) for point in curve],
        x_name="file",
        y_name="divergence from the float network",
        x_text=mib,
        mark=None if chosen is None else (*chosen, f"{mib(chosen[0])}, {chosen[1]:.2g}"),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `quantize` will do, and the bytes it will take.

    Attributes:
        layers: the layers that will be quantized, in execution order.
        skipped: the layers that stay float, with reasons.
        original_bytes: bytes of the float network's parameters and buffers, without parts that evaluation mode never
            uses, or of the network before pruning.
        compressed_bytes: length in bytes of the file that `save` will write.
        paper_bytes: bytes by the paper's accounting: codes, codebooks in half precision, every other parameter in
            float32; batch-norm statistics are not counted.
        notes: how a budget was spent.
        expected_divergence: from the float network, with calibration data and sizes that are chosen; None otherwise.
        curve: bytes against expected divergence, bytes ascending; with calibration data only.
        memory_bytes: the most that parameters and buffers of the compressed network take in memory.
    """

    layers: tuple[PlannedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    original_bytes: int
    compressed_bytes: int
    paper_bytes: int
    notes: tuple[str, ...] = ()
    expected_divergence: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    memory_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """Compression ratio, `original_bytes / compressed_bytes`."""
        return self.original_bytes / self.compressed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return dataclasses.asdict(self) | {"ratio": self.ratio}

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Draw the curve of bytes against expected divergence, with the chosen file.

        Args:
            path: the SVG file to write.

        Raises:
            ConfigError: the plan has no curve, because it was made without calibration data.
        """
        if not self.curve:
            raise ConfigError("the plan has no curve: give plan() calibration data")
        chosen = None
        if self.expected_divergence is not None:
            chosen = self.compressed_bytes, self.expected_divergence
        Path(path).write_text(curve_chart(self.curve, chosen), encoding="utf-8")

    def __str__(self) -> str:
        rows = [
            [x.name, x.kind, "×".join(map(str, x.weight_shape)), x.block_size]
            + [x.codebook_size if x.codes == BLOCKS else x.codes]
            + [f"{x.bits_per_weight:.2f}", mib(x.compressed_bytes), x.note]
            for x in self.layers
        ]
        header = ["layer", "kind", "weight", "block", "codebook", "bits/weight", "size", "note"]
        lines = [table(header, rows)]
        if self.skipped:
            lines += ["", table(["left float", "reason"], [[s.name, s.reason] for s in self.skipped])]
        if self.curve:
            points = [
                [mib(p.file_bytes), f"{self.original_bytes / p.file_bytes:.1f}×", f"{p.expected_divergence:.2g}"]
                for p in self.curve
            ]
            lines += ["", table(["file", "ratio", "expected divergence"], points)]
        lines += [
            "",
            *self.notes,
            f"{len(self.layers)} layers quantized, {len(self.skipped)} left float: "
            f"{mib(self.original_bytes)} → {mib(self.compressed_bytes)} ({self.ratio:.1f}×)"
            + ("; " if self.memory_bytes is None else f", in memory {mib(self.memory_bytes)}; ")
            + f"by the paper's accounting {mib(self.paper_bytes)}",
        ]
        return "\n".join(lines)
