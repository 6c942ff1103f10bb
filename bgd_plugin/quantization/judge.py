"""The last check of a run: how well the compressed network answers, on samples that the fit has not seen."""

from __future__ import annotations

import math

from bgd_plugin.calibration import first_samples
from bgd_plugin.graph import set_modes, untouched
from bgd_plugin.planning.answers import Answers, compare_answers
from bgd_plugin.planning.outputs import Measure
from bgd_plugin.quantization.job import Job
from bgd_plugin.support.processes import largest

__all__ = ["judged"]

_JUDGED = 32
"""Samples on which the answers are compared where none were kept aside."""
_TOKENS = 2048
"""Tokens of texts that are enough then."""


def judged(job: Job, measure: Measure | None = None) -> Answers:
    """How the compressed network answers beside the float network.

    Args:
        job: the run; its student has the values that will be saved, answers in evaluation mode, and is as before
            afterwards. Finetuning walks all of the calibration data, so that after it no sample counts as kept aside.
        measure: by which sizes were chosen; None: as the float network's outputs are.
    """
    has_aside = -largest(-len(job.aside)) > 0  # in every process
    batches = job.aside if has_aside else first_samples(job.batches, _JUDGED)
    with untouched(job.student) as (answering,), job.log.timed("answers"):
        set_modes(answering, {"": False})
        return compare_answers(
            lambda batch: batch.call(answering),
            lambda batch: batch.call(job.reference),
            batches,
            kept_aside=has_aside and not job.config.finetuning,
            measure=measure,
            enough_tokens=math.inf if has_aside else _TOKENS,
        )
