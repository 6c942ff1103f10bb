"""The last steps: round to storage types, keep within the budget, restore modes and gradient flags, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bgd_plugin.calibration import BatchStore
from bgd_plugin.files.content import measured_size
from bgd_plugin.files.format import state_bytes
from bgd_plugin.files.rounding import round_floats_, round_weights_
from bgd_plugin.graph import module_or_none, set_modes
from bgd_plugin.nn import PQModule, freeze_norms_
from bgd_plugin.planning.answers import Answers
from bgd_plugin.planning.lean import coarse_weights
from bgd_plugin.planning.sizes import paper_bytes
from bgd_plugin.planning.survey import Survey
from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.quantization.job import Job
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Report
from bgd_plugin.support.processes import synchronize_
from bgd_plugin.support.tables import mib

__all__ = ["finish", "reported", "restore_", "round_to_storage_"]

_LEAST_HALF = torch.finfo(torch.half).smallest_normal


def finish(job: Job, network: nn.Module) -> int:
    """Round the compressed network's tensors to the values that its file will have; returns the file's bytes."""
    round_to_storage_(network, job.survey)
    synchronize_(network)
    size, target = measured_size(network), job.config.budget_bytes(job.survey.original_bytes)
    if target is None or size <= target:
        return size
    names = _round_tiny_values_(network)
    if not names:
        return size
    job.log.note(f"budget: tiny values rounded to half precision to stay within it: {', '.join(names)}")
    return measured_size(network)


def round_to_storage_(student: nn.Module, survey: Survey) -> None:
    """Round everything to its storage type."""
    config = survey.config
    for planned in survey.layers:
        layer = module_or_none(student, planned.target)
        if isinstance(layer, PQModule):
            layer.round_codebook_(planned.codebook_storage)
    coarse = coarse_weights(survey)
    if config.freeze_norms:
        freeze_norms_(student)
    round_weights_(student, [name for name in survey.leftovers if name not in coarse], config.weight_storage)
    if config.float_storage == "float16":
        round_floats_(student, survey.tables)


@torch.no_grad()
def _round_tiny_values_(student: nn.Module) -> list[str]:
    """Round biases and means that became too small for half precision to zero, where they would enlarge the file.

    Returns:
        the names of the rounded tensors.
    """
    rounded = []
    for name, value in student.state_dict().items():
        half = value.half().to(value)
        is_tiny = value.ndim == 1 and value.is_floating_point() and 0 < float(value.abs().max()) < _LEAST_HALF
        if is_tiny and not torch.equal(half, value):
            value.copy_(half)
            rounded.append(name)
    return rounded


def restore_(student: nn.Module, model: nn.Module, learnt: Mapping[str, bool]) -> None:
    """Set the student's training modes and gradient flags to those of the user's network.

    Args:
        student: the compressed network; changed in place.
        model: the user's network.
        learnt: whether a layer's weight required gradients, by target.
    """
    set_modes(student, {path: module.training for path, module in model.named_modules()})
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    for target, is_learnt in learnt.items():
        module = module_or_none(student, target)
        if isinstance(module, PQModule):
            module.codebook.requires_grad_(is_learnt)


def reported(
    job: Job,
    network: nn.Module,
    outcomes: Sequence[LayerReport | SkippedLayer],
    compressed_bytes: int,
    answers: Answers,
) -> Report:
    """The report of a finished run.

    Args:
        network: the compressed one.
        outcomes: the outcome for each layer of the survey.
        compressed_bytes: the length of its file.
        answers: the comparison of its outputs with the float network's.
    """
    if job.batches.store.spilled_bytes:
        job.log.note(_memory_note(job.batches.store))
    return Report(
        layers=tuple(outcome for outcome in outcomes if isinstance(outcome, LayerReport)),
        skipped=(*job.survey.skipped, *(outcome for outcome in outcomes if isinstance(outcome, SkippedLayer))),
        original_bytes=job.survey.original_bytes,
        compressed_bytes=compressed_bytes,
        paper_bytes=paper_bytes(network),
        memory_bytes=state_bytes(network.state_dict()),
        answers=answers,
        expected_divergence=job.survey.expected_divergence,
        curve=job.survey.curve,
        seconds=job.log.seconds,
        notes=tuple(job.log.notes),
    )


def _memory_note(store: BatchStore) -> str:
    peak, bound, spilled = mib(store.peak_bytes), mib(store.bound_bytes or 0), mib(store.spilled_bytes)
    note = f"calibration values: at most {peak} of {bound} in memory, {spilled} in a file"
    above = store.peak_bytes > (store.bound_bytes or 0)
    return f"{note}; a batch needs more than half of memory_bytes: give smaller batches" if above else note
