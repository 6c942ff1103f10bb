"""The report's row for one layer: the single record of its outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.forms import BLOCKS, TRELLIS
from bgd_plugin.support.tables import mib

__all__ = ["LayerReport"]

_LARGE_ERROR = 0.3
_SMALL_SAVING = 0.75
"""A layer that takes more than this share of its half-precision bytes saves almost nothing."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A quantized layer.

    Attributes:
        name: the layer's name.
        kind: "conv2d", "linear" and so on.
        block_size, codebook_size: as used, after any adjustment to the layer.
        weights: number of weights.
        bits_per_weight: bits of codes and codebook per weight.
        compressed_bytes: bytes of codes and codebook in the file.
        memory_bytes: the same in memory.
        relative_error: ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of the layer's calibration inputs.
        bias_gain: reduction of the squared output error by the bias correction, relative to the outputs' variance; None
            if no bias was corrected.
        note: deviations from the setting, with reasons, and warnings about the fit, such as unused codewords.
        advice: what to do about a layer with a large error or little saving; empty otherwise.
        codes: "blocks", "entropy" or "trellis", as of `PlannedLayer`.
    """

    name: str
    kind: str
    block_size: int
    codebook_size: int
    weights: int
    bits_per_weight: float
    compressed_bytes: int
    memory_bytes: int
    relative_error: float
    bias_gain: float | None = None
    note: str = ""
    advice: str = ""
    codes: str = BLOCKS

    @property
    def looked_up_in(self) -> int | str:
        """What a table says of the layer's codebook.

        Returns:
            the number of codewords; the name of a form that has none of its own.
        """
        return self.codes if self.codes == TRELLIS else self.codebook_size

    @classmethod
    def of(
        cls,
        planned: PlannedLayer,
        *,
        relative_error: float,
        bias_gain: float | None = None,
        warnings: Sequence[str] = (),
    ) -> LayerReport:
        """The row of a finished layer.

        Args:
            planned: the layer as planned.
            relative_error: as in the attribute.
            bias_gain: a share of the outputs' variance, as in the attribute.
            warnings: warnings about the fit.

        Returns:
            the row.
        """
        return cls(
            name=planned.name,
            kind=planned.kind,
            block_size=planned.block_size,
            codebook_size=planned.codebook_size,
            weights=planned.weights,
            bits_per_weight=planned.bits_per_weight,
            compressed_bytes=planned.compressed_bytes,
            memory_bytes=planned.memory_bytes,
            relative_error=relative_error,
            bias_gain=bias_gain,
            note="; ".join(filter(None, (planned.note, *warnings))),
            advice="; ".join(_advice(planned, relative_error)),
            codes=planned.codes,
        )


def _advice(planned: PlannedLayer, relative_error: float) -> Iterator[str]:
    """What to do about a layer with a large error or little saving."""
    name = planned.name
    if relative_error > _LARGE_ERROR:
        yield (
            f"output error above {_LARGE_ERROR:.0%}: give it smaller blocks or more codewords, or keep it float with "
            f"the override ({name!r}, None)"
        )
    half_precision = 2 * planned.weights
    if planned.compressed_bytes > _SMALL_SAVING * half_precision:
        saved = max(0, half_precision - planned.compressed_bytes)
        yield (
            f"saves only {mib(saved)} of {mib(half_precision)} in half precision: keep it float with the override "
            f"({name!r}, None)"
        )
