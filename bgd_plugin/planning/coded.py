"""What the fit has made of a planned layer whose codes are entropy coded: its levels, and its bytes in the file."""

from __future__ import annotations

import dataclasses

from bgd_plugin.encoding.stream import coded_bytes
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.types import PlannedLayer

__all__ = ["as_coded"]


def as_coded(planned: PlannedLayer, layer: PQModule) -> PlannedLayer:
    """The planned layer with the levels and bytes of its module; one of blocks is returned unchanged.

    Args:
        planned: the layer as planned.
        layer: the module that was made of it.
    """
    if planned.codes != "entropy":
        return planned
    levels = layer.codebook_size
    level_bytes = levels + 4 if planned.codebook_storage == "int8" else 2 * levels
    packed = -(-layer.codes.numel() * layer.code_bits // 8)  # what the file holds of a layer too small for a stream
    codes = min(packed, coded_bytes(layer.codes, levels))
    return dataclasses.replace(planned, codebook_size=levels, size_bytes=codes + level_bytes)
