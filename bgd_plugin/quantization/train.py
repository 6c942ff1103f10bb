"""Train the network after its last layer is fitted: block-wise reconstruction, then finetuning."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.calibration import Batch, Forward, iterate_batches, logits_of
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import copy_module, set_modes
from bgd_plugin.planning.lean import coarse_weights
from bgd_plugin.quantization.job import Job
from bgd_plugin.support.processes import is_first, synchronize_
from bgd_plugin.support.steps import Steps
from bgd_plugin.training import Epochs, finetune_, kl_to_teacher, reconstruct_, reconstruct_modules_
from bgd_plugin.training.reconstruction import Reconstruction

__all__ = ["check_teacher", "teacher_for", "train"]


def train(job: Job, calibration: Iterable[Any], forward: Forward | None) -> None:
    """Reconstruct and finetune according to the settings; the student is changed.

    Args:
        job: the run, with all layers quantized.
        calibration, forward: as in `quantize`; finetuning iterates over the data again.
    """
    if job.config.reconstruction:
        if is_first():  # with several processes, on the first one's part of the data
            _reconstruct(job)
        synchronize_(job.student)
    if job.config.finetuning:
        _finetune(job, calibration, forward)


def teacher_for(model: nn.Module, config: BGDConfig, device: torch.device) -> nn.Module | None:
    """A copy in evaluation mode on `device`; the user's network keeps its mode and device.

    None if no training uses it.
    """
    if not (config.distillation or config.finetuning):
        return None
    parameter = next(model.parameters(), None)
    moves = parameter is not None and parameter.device != device
    copied: nn.Module = copy_module(model, share_tensors=not moves)
    set_modes(copied, {"": False})
    return copied.to(device) if moves else copied


@torch.no_grad()
def check_teacher(job: Job, *, is_given: bool) -> None:
    """Check on one batch, before the work starts, that a teacher's logits have the network's shape.

    Args:
        is_given: whether the user gave a teacher; the float network itself needs no check.
    """
    if not is_given:
        return
    if job.teacher is None:
        job.log.note("the teacher was not used: distillation and finetuning are off")
        return
    batch = job.batches[0]
    kl_to_teacher(logits_of(batch.call(job.reference)), logits_of(batch.call(job.teacher)))


def _reconstruct(job: Job) -> None:
    job.bar.set_description("reconstruct")
    with job.log.timed("reconstruct"):
        gain = _along_graph(job) if isinstance(job.student, fx.GraphModule) else _by_runs(job)
    job.log.note(
        f"reconstruction: {gain.blocks} blocks, mean loss on held-out samples {gain.before:.4g} → {gain.after:.4g}"
        + (f"; undone in {gain.taken_back} blocks without a gain" if gain.taken_back else "")
    )


def _generator(job: Job, name: str) -> torch.Generator:
    return job.generator(f"{name} reconstruction")


def _steps(job: Job, number: int) -> Steps:
    return job.run.steps(f"block-{number:04d}", job.bar.update, is_shared=False)


def _along_graph(job: Job) -> Reconstruction:
    assert isinstance(job.student, fx.GraphModule) and isinstance(job.reference, fx.GraphModule)
    assert job.config.reconstruction
    generator, steps = functools.partial(_generator, job), functools.partial(_steps, job)
    fixed = coarse_weights(job.survey)
    return reconstruct_(
        job.student, job.reference, job.batches, job.config.reconstruction, generator, steps, fixed=fixed
    )


def _by_runs(job: Job) -> Reconstruction:
    config = job.config.reconstruction
    assert config

    def on_blocks(count: int) -> None:
        job.bar.total = (job.bar.total or 0) + count * config.steps

    return reconstruct_modules_(
        job.student,
        job.reference,
        job.batches,
        {layer.name: layer.weight for layer in job.survey.found},
        config,
        functools.partial(_generator, job),
        functools.partial(_steps, job),
        on_blocks,
    )


def _finetune(job: Job, calibration: Iterable[Any], forward: Forward | None) -> None:
    assert job.config.finetuning and job.teacher
    device = next(job.student.parameters()).device
    set_epoch = getattr(calibration, "set_epoch", None)

    def epoch(number: int) -> Iterator[Batch]:
        if set_epoch is not None:
            set_epoch(number + 1)  # pass number 0 collected the calibration batches
        return iterate_batches(calibration, job.student, device=device, forward=forward)

    job.bar.set_description("finetune")
    with job.log.timed("finetune"):
        data = Epochs(epoch, can_skip=set_epoch is not None or isinstance(calibration, (list, tuple)))
        steps = job.run.steps("finetuning", job.bar.update)
        result = finetune_(
            job.student,
            job.teacher,
            data,
            job.batches.given,
            job.config.finetuning,
            steps,
            fixed=coarse_weights(job.survey),  # small integers: a gradient step would take them off their grid
        )
    job.log.note(f"finetuning: {result}")
