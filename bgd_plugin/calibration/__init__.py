"""Calibration: the network's live values on the user's data, node by node, and what the fit needs to know of them."""

from bgd_plugin.calibration.batches import (
    Batch,
    Batches,
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
    paired_pieces,
    pooled_gram,
    sampled_inputs,
)
from bgd_plugin.calibration.store import BatchStore
from bgd_plugin.calibration.walk import Walk

__all__ = [
    "Batch",
    "BatchStore",
    "Batches",
    "Forward",
    "InputSample",
    "LayerInputs",
    "PairedRows",
    "PooledGram",
    "Walk",
    "collect_batches",
    "iterate_batches",
    "logits_of",
    "paired_pieces",
    "pooled_gram",
    "require_rewalkable",
    "sampled_inputs",
]
