"""The one transform: a float network in, a compressed one out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from bgd_plugin import kernels
from bgd_plugin.calibration import DEFAULT_BOUND_BYTES, Forward, collect_batches, take_aside_
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import (
    baked,
    batchnorms_in_parts,
    copy_module,
    isolate_weights_,
    isolated,
    unwrapped,
)
from bgd_plugin.quantization.checks import check_arguments
from bgd_plugin.quantization.finish import finish, reported, restore_
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.judge import judged
from bgd_plugin.quantization.layerwise import quantize_layers
from bgd_plugin.quantization.prepare import prepared, prepared_for
from bgd_plugin.quantization.progress_bar import progress_bar
from bgd_plugin.quantization.quality import within_bound
from bgd_plugin.quantization.resume import Run
from bgd_plugin.quantization.settle import settled
from bgd_plugin.quantization.spend import spent
from bgd_plugin.quantization.train import check_teacher, teacher_for, train
from bgd_plugin.report.report import Quantized
from bgd_plugin.support.log import Log
from bgd_plugin.support.processes import is_first, watched
from bgd_plugin.support.reproducible import if_asked

__all__ = ["quantize"]


@watched()
@if_asked
@kernels.disabled()
@isolated
def quantize(
    model: nn.Module | ExportedProgram,
    calibration: Iterable[Any],
    config: BGDConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    forward: Forward | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory_bytes: int | None = DEFAULT_BOUND_BYTES,
    reproducible: bool = False,
    progress: bool = True,
    original_bytes: int | None = None,
) -> Quantized:
    """Compress a network by product quantization that preserves each layer's outputs on real inputs.

    Inside an initialized process group of `torch.distributed`, every process calls this with the same network and
    settings and its own part of the calibration data, and every process gets the same result.

    Args:
        model: the float network; it is left untouched. What `torch.export` gives goes in, too, and what comes out can
            be exported again.
        calibration: batches of inputs, without labels. A batch is a tensor, a sequence whose first item is the input,
            or a mapping of keyword arguments. Finetuning iterates over it several times; if it has a method
            `set_epoch(number)`, this is called before each of these passes with 1, 2, 3 and so on.
        config: what to quantize and how; `BGDConfig()` if not given.
        teacher: network whose logits distillation and finetuning match; the float network if not given.
        forward: `callable(model, batch)` for batches of any other form.
        checkpoint: folder in which progress is saved: each finished layer, and training every half minute. A call with
            the same arguments resumes there, and produces the same bytes as an uninterrupted one. With several
            processes only the first one reads and writes it.
        memory_bytes: limit for calibration data and the networks' values on it in memory; the rest is kept in a
            temporary file. The result is the same. 1 GiB unless given; None: no limit.
        reproducible: compute on one thread with torch's deterministic algorithms, so that the file does not depend on
            the number of threads. Without it, the file is the same for the same number of threads.
        progress: show a progress bar.
        original_bytes: if earlier steps such as pruning made the network smaller, the bytes of the network before them,
            such as `plan(dense).original_bytes`; the report's ratio is then that of all steps.

    Returns:
        the compressed network, of the class of `model`, and a report.

    Raises:
        BGDError: one of its subclasses; the message names the layer, what was found, and what to do.
    """
    config = config or BGDConfig()
    bound = config.max_divergence
    if bound is not None and isinstance(calibration, Iterator):
        calibration = list(calibration)  # another pass walks it again

    def run(realized: float, number: int) -> Quantized:
        folder = Path(checkpoint) / f"pass-{number + 1}" if checkpoint is not None and number else checkpoint
        return _one_pass(
            model,
            calibration,
            config,
            realized,
            teacher=teacher,
            forward=forward,
            checkpoint=folder,
            memory_bytes=memory_bytes,
            progress=progress,
            original_bytes=original_bytes,
        )

    return run(1.0, 0) if bound is None else within_bound(run, bound)


def _one_pass(
    model: nn.Module | ExportedProgram,
    calibration: Iterable[Any],
    config: BGDConfig,
    realized: float,
    *,
    teacher: nn.Module | None,
    forward: Forward | None,
    checkpoint: str | os.PathLike[str] | None,
    memory_bytes: int | None,
    progress: bool,
    original_bytes: int | None,
) -> Quantized:
    """Compress once; the arguments are those of `quantize`, and what corrects the expected divergences."""
    model = baked(unwrapped(model))
    check_arguments(model, calibration, config, memory_bytes)
    first = prepared(model, config, original_bytes)
    device = next(model.parameters()).device
    batches = collect_batches(calibration, model, device=device, forward=forward, memory_bytes=memory_bytes)
    ready = prepared_for(first, model, config, original_bytes, batches)
    student, survey, budget = ready.front.network, ready.survey, ready.budget
    run = Run.open(checkpoint if is_first() else None, model, config, batches, teacher)
    aside = take_aside_(batches, config.kept_aside)
    log = Log()
    survey = spent(survey, budget, batches, log, realized, progress=progress)
    log.note(*survey.notes)
    learnt = {layer.target: layer.weight.requires_grad for layer in survey.found}
    isolate_weights_(student, survey.found)
    reference = copy_module(student, share_tensors=True)
    with progress_bar(survey, batches.given, shown=progress) as bar, run.says_how_to_go_on():
        job = Job(
            student=student,
            reference=reference,
            teacher=teacher_for(model if teacher is None else unwrapped(teacher), config, device),
            config=config,
            survey=survey,
            norms={} if isinstance(student, fx.GraphModule) else batchnorms_in_parts(student),
            batches=batches,
            aside=aside,
            run=run,
            bar=bar,
            log=log,
        )
        check_teacher(job, is_given=teacher is not None)
        outcomes = quantize_layers(job)
        train(job, calibration, forward)
    result = settled(ready.front, student, batches)
    compressed_bytes, answers = finish(job, result), judged(job, result)
    restore_(result, model, learnt)
    return Quantized(result, reported(job, result, outcomes, compressed_bytes, answers))
