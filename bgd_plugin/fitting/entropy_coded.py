"""Codes that the file holds as an entropy-coded stream: one layer, fitted to the bytes that its plan has for it."""

from __future__ import annotations

from torch import Tensor

from bgd_plugin.fitting.method import FittedLayer
from bgd_plugin.nn import storable
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.entropy import fit_entropy

__all__ = ["fit_stream"]


def fit_stream(weight: Tensor, gram: Tensor | None, layer: PlannedLayer, *, damping: float = 0.01) -> FittedLayer:
    """Fit one weight; the levels are rounded to the storage type of the layer's plan.

    Args:
        weight: `[rows, ...]`.
        gram: second moments of the inputs, `[groups, columns, columns]`; None: nothing is known about them.
        layer: the planned layer, whose `size_bytes` are not exceeded.
        damping: of the Gram, in units of its mean diagonal.

    Raises:
        ValueError: the bytes are too few for the layer.
    """
    level_bytes = 1 if layer.codebook_storage == "int8" else 2
    rows = weight.detach().float().flatten(1)
    fit = fit_entropy(rows, gram, layer.size_bytes, level_bytes=level_bytes, damping=damping)
    codebook = storable(fit.codebook, layer.codebook_storage).to(weight.dtype)
    return FittedLayer(codebook=codebook, codes=fit.codes)
