"""What the report says of one layer: the one record that a run makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bgd_plugin.planning.types import PlannedLayer

__all__ = ["LayerReport"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A quantized layer.

    Attributes:
        bits_per_weight: packed codes and codebook, shared out over the weights.
        compressed_bytes: packed codes and codebook.
        relative_error: ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on a sample of the layer's calibration inputs.
        bias_gain: what correcting the bias takes off the squared error of the layer's outputs, in units of their
            variance; None where no bias was corrected.
        note: what differs from the setting, and why; and what the fit found out, such as codewords that are not used.
    """

    name: str
    kind: str
    block_size: int
    codebook_size: int
    weights: int
    bits_per_weight: float
    compressed_bytes: int
    relative_error: float
    bias_gain: float | None = None
    note: str = ""

    @classmethod
    def of(
        cls,
        planned: PlannedLayer,
        *,
        relative_error: float,
        bias_gain: float | None = None,
        warnings: Sequence[str] = (),
    ) -> LayerReport:
        """A planned layer that is done; `warnings` are those of its fit."""
        return cls(
            name=planned.name,
            kind=planned.kind,
            block_size=planned.block_size,
            codebook_size=planned.codebook_size,
            weights=planned.weights,
            bits_per_weight=planned.bits_per_weight,
            compressed_bytes=planned.compressed_bytes,
            relative_error=relative_error,
            bias_gain=bias_gain,
            note="; ".join(filter(None, (planned.note, *warnings))),
        )
