"""What `quantize` returns: the compressed network, and what was done, layer by layer: bytes, errors, seconds."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bgd_plugin.planning.answers import Answers
from bgd_plugin.planning.types import CurvePoint, SkippedLayer, curve_chart
from bgd_plugin.report.html import write_page
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.support.tables import mib, percent, table

__all__ = ["Quantized", "Report"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `quantize` did.

    Attributes:
        layers, skipped: in the order in which they run.
        original_bytes: parameters and buffers of the float network, without parts that evaluation mode never uses, or
            of the network that a chain started from.
        compressed_bytes: length of the file that `save` writes.
        paper_bytes: size by the paper's own accounting.
        memory_bytes: parameters and buffers of the compressed network in memory; None where nobody counted them.
        expected_divergence: what the choice of sizes expected the divergence to be; None where sizes are fixed.
        curve: bytes against expected divergence, where sizes were chosen by what was measured.
        answers: how the compressed network, as it will be saved, answers beside the float network; None without data.
        seconds: wall-clock seconds of each step of the work.
        notes: what happened beyond the layers, such as a step that had nothing to do.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    original_bytes: int
    compressed_bytes: int
    paper_bytes: int
    memory_bytes: int | None = None
    answers: Answers | None = None
    expected_divergence: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Compression ratio, `original_bytes / compressed_bytes`."""
        return self.original_bytes / self.compressed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON.

        Returns:
            all attributes and `ratio`.
        """
        return dataclasses.asdict(self) | {"ratio": self.ratio}

    def to_json(self) -> str:
        """The report as JSON.

        Returns:
            the text of `to_dict`.
        """
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page with the size and error of each layer.

        Args:
            path: the file to write.
        """
        sizes = [
            (mib(self.original_bytes), "float network"),
            (mib(self.compressed_bytes), "compressed file"),
            (f"{self.ratio:.1f}×", "smaller"),
            (mib(self.paper_bytes), "by the paper's accounting"),
            (str(len(self.layers)), f"layers quantized, {len(self.skipped)} left float"),
        ]
        if self.answers is not None:
            sizes.append((f"{self.answers.divergence:.3g}", f"{self.answers.measure} from the float network"))
            if self.answers.agreement is not None:
                sizes.append((f"{self.answers.agreement:.1%}", "most likely class as in the float network"))
        chart = ""
        if self.curve and self.answers is not None:
            chart = curve_chart(self.curve, (self.compressed_bytes, self.answers.divergence))
        write_page(path, sizes, self.layers, self.skipped, self.notes, self.seconds, chart)

    def __str__(self) -> str:
        header = ["layer", "kind", "block", "codebook", "bits/weight", "size", "error", "note"]
        rows = [
            [x.name, x.kind, x.block_size, x.looked_up_in, f"{x.bits_per_weight:.2f}", mib(x.compressed_bytes)]
            + [percent(x.relative_error), x.note]
            for x in self.layers
        ]
        lines = [table(header, rows)]
        memory = "" if self.memory_bytes is None else f", in memory {mib(self.memory_bytes)}"
        if self.skipped:
            lines += ["", table(["left float", "reason"], [[s.name, s.reason] for s in self.skipped])]
        lines += ["", *self.notes, *([str(self.answers)] if self.answers else [])]
        lines.append(
            f"{len(self.layers)} layers quantized, {len(self.skipped)} left float: "
            f"{mib(self.original_bytes)} → {mib(self.compressed_bytes)} ({self.ratio:.1f}×){memory}; "
            f"by the paper's accounting {mib(self.paper_bytes)}"
        )
        lines.append(", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`: the compressed network (`model`), and the report."""

    model: nn.Module
    report: Report
