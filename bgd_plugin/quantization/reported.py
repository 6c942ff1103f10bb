"""What a pass comes to: the bytes of its file, its answers, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bgd_plugin.calibration import BatchStore
from bgd_plugin.files.content import measured_size
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.graph import Front, untouched
from bgd_plugin.planning.answers import Answers
from bgd_plugin.planning.sizes import paper_bytes
from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.quantization.finish import round_to_storage_
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.settle import transplanted_into
from bgd_plugin.quantization.spending import shorten_
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Report
from bgd_plugin.support.processes import synchronize_
from bgd_plugin.support.tables import mib

__all__ = ["Sizes", "reported", "sized"]

_LEAST_HALF = torch.finfo(torch.half).smallest_normal


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a compressed network is.

    Attributes:
        compressed_bytes: length of its file.
        paper_bytes: by the paper's accounting.
        memory_bytes: of its parameters and buffers.
    """

    compressed_bytes: int
    paper_bytes: int
    memory_bytes: int


def sized(job: Job, front: Front) -> Sizes:
    """Round the student's tensors to the values that its file will have, and count them.

    Args:
        job: the run, with all layers fitted.
        front: whose own network has the student's layers only while they are counted.
    """
    round_to_storage_(job.student, job.survey)
    synchronize_(job.student)
    with untouched(front.own) as (own,):
        network = transplanted_into(own, job.student, job.survey)
        size, target = measured_size(network), job.config.budget_bytes(job.survey.original_bytes)
        if target is not None and size > target and (names := _round_tiny_values_(network)):
            job.log.note(f"budget: tiny values rounded to half precision to stay within it: {', '.join(names)}")
            size = measured_size(network)
        if target is not None and size > target and (names := shorten_(job.survey, network, target)):
            job.log.note(f"budget: codes fitted again, to fewer bytes, to stay within it: {', '.join(names)}")
            size = measured_size(network)
        return Sizes(
            compressed_bytes=size,
            paper_bytes=paper_bytes(network),
            memory_bytes=state_bytes(network.state_dict()),
        )


@torch.no_grad()
def _round_tiny_values_(network: nn.Module) -> list[str]:
    """Round biases and means that became too small for half precision to zero, where they would enlarge the file.

    Returns:
        the names of the rounded tensors.
    """
    rounded = []
    for name, value in network.state_dict().items():
        half = value.half().to(value)
        is_tiny = value.ndim == 1 and value.is_floating_point() and 0 < float(value.abs().max()) < _LEAST_HALF
        if is_tiny and not torch.equal(half, value):
            value.copy_(half)
            rounded.append(name)
    return rounded


def reported(job: Job, outcomes: Sequence[LayerReport | SkippedLayer], sizes: Sizes, answers: Answers) -> Report:
    """The report of a finished run.

    Args:
        job: the run.
        outcomes: the outcome for each layer of the survey.
        sizes: of the compressed network.
        answers: the comparison of its outputs with the float network's.
    """
    if job.batches.store.spilled_bytes:
        job.log.note(_memory_note(job.batches.store))
    return Report(
        layers=tuple(outcome for outcome in outcomes if isinstance(outcome, LayerReport)),
        skipped=(*job.survey.skipped, *(outcome for outcome in outcomes if isinstance(outcome, SkippedLayer))),
        original_bytes=job.survey.original_bytes,
        compressed_bytes=sizes.compressed_bytes,
        paper_bytes=sizes.paper_bytes,
        memory_bytes=sizes.memory_bytes,
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
