"""Calibration: the network's live values on the user's data, node by node, and the statistics that the fit needs."""

from bgd_plugin.calibration.agreement import answers_differ, answers_of, difference, first_difference, given_arguments
from bgd_plugin.calibration.aside import take_aside_
from bgd_plugin.calibration.batches import (
    Batch,
    Batches,
    Forward,
    iterate_batches,
    logits_of,
    require_rewalkable,
)
from bgd_plugin.calibration.collect import collect_batches
from bgd_plugin.calibration.cutting import first_samples
from bgd_plugin.calibration.finite import require_finite
from bgd_plugin.calibration.form import checked, shared_difference
from bgd_plugin.calibration.gram_pooled import PooledGram, pooled_gram
from bgd_plugin.calibration.inputs import CollectedInputs, LayerInputs, embedding_inputs
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.live_values import Walk
from bgd_plugin.calibration.recording import Records
from bgd_plugin.calibration.replay import Recorder, Replayer
from bgd_plugin.calibration.rerun import Rerun
from bgd_plugin.calibration.rows import InputSample, PairedRows, paired_pieces, sampled_inputs
from bgd_plugin.calibration.spread import enough_batches
from bgd_plugin.calibration.store import DEFAULT_BOUND_BYTES, BatchStore
from bgd_plugin.calibration.thinned import ThinHead, answers_at_some_tokens, at_first_tokens
from bgd_plugin.calibration.watch import Watch

__all__ = [
    "DEFAULT_BOUND_BYTES",
    "Batch",
    "BatchStore",
    "Batches",
    "CollectedInputs",
    "Forward",
    "InputSample",
    "LayerInputs",
    "PairedRows",
    "PooledGram",
    "Recorder",
    "Records",
    "Replayer",
    "Rerun",
    "ThinHead",
    "Walk",
    "Watch",
    "answers_at_some_tokens",
    "answers_differ",
    "answers_of",
    "at_first_tokens",
    "checked",
    "collect_batches",
    "difference",
    "embedding_inputs",
    "enough_batches",
    "first_difference",
    "first_samples",
    "given_arguments",
    "intercepted",
    "iterate_batches",
    "logits_of",
    "paired_pieces",
    "pooled_gram",
    "require_finite",
    "require_rewalkable",
    "run_module",
    "sampled_inputs",
    "shared_difference",
    "take_aside_",
]
