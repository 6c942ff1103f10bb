"""Calibration: the network's live values on the user's data, node by node, and what the fit needs to know of them."""

from bgd_plugin.calibration.batches import (
    Batch,
    Forward,
    collect_batches,
    iterate_batches,
    logits_of,
    require_rewalkable,
)
from bgd_plugin.calibration.statistics import (
    InputSample,
    LayerInputs,
    PairedRows,
    PooledGram,
    paired_rows,
    pooled_gram,
    sampled_inputs,
)
from bgd_plugin.calibration.walk import Walk

__all__ = [
    "Batch",
    "Forward",
    "InputSample",
    "LayerInputs",
    "PairedRows",
    "PooledGram",
    "Walk",
    "collect_batches",
    "iterate_batches",
    "logits_of",
    "paired_rows",
    "pooled_gram",
    "require_rewalkable",
    "sampled_inputs",
]
