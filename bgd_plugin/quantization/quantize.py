"""The one transform: a float network in, a compressed one out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from bgd_plugin.calibration import DEFAULT_BOUND_BYTES, Forward, collect_batches
from bgd_plugin.config import BGDConfig, given_config
from bgd_plugin.graph import baked, isolated, unwrapped
from bgd_plugin.kernels.switch import plain_layers
from bgd_plugin.quantization.checks import check_arguments
from bgd_plugin.quantization.one_pass import Task
from bgd_plugin.quantization.prepare import prepared, prepared_for
from bgd_plugin.quantization.quality import within_bound
from bgd_plugin.report.report import Quantized
from bgd_plugin.support.processes import watched
from bgd_plugin.support.reproducible import if_asked

__all__ = ["quantize"]


@watched()
@if_asked
@plain_layers()
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
        config: what to quantize and how. By default the smallest file is sought whose answers stay within a bound on
            the divergence from the float network's; sizes that a budget or the settings fix are kept to instead.
        teacher: network whose logits distillation and finetuning match; the float network if not given.
        forward: `callable(model, batch)` for batches of any other form.
        checkpoint: folder in which progress is saved: each finished layer, and training every half minute. A call with
            the same arguments resumes there, and produces the same bytes as an uninterrupted one. With several
            processes only the first one reads and writes it.
        memory_bytes: limit for calibration data and the networks' values on it in memory; the rest is kept in a
            temporary file. The result is the same. 512 MiB unless given; None: no limit.
        reproducible: compute on one thread with torch's deterministic algorithms, so that the file does not depend on
            the number of threads. Without it, the file is the same for the same number of threads.
        progress: show progress bars.
        original_bytes: if earlier steps such as pruning made the network smaller, the bytes of the network before them,
            such as `plan(dense).original_bytes`; the report's ratio is then that of all steps.

    Returns:
        the compressed network, of the class of `model`, and a report.

    Raises:
        BGDError: one of its subclasses; the message names the layer, what was found, and what to do.
    """
    config = given_config(config).decided(has_data=True)
    model = baked(unwrapped(model))
    check_arguments(model, calibration, config, memory_bytes)
    first = prepared(model, config, original_bytes)
    device = next(model.parameters()).device
    batches = collect_batches(calibration, model, device=device, forward=forward, memory_bytes=memory_bytes)
    ready = prepared_for(first, model, config, original_bytes, batches)
    task = Task(
        model=model,
        calibration=calibration,
        config=config,
        teacher=None if teacher is None else unwrapped(teacher),
        forward=forward,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=progress,
        batches=batches,
        ready=ready,
        learnt={layer.target: layer.weight.requires_grad for layer in ready.survey.found},
    )
    best = task.once() if config.bound is None else within_bound(task.run)
    return Quantized(best.network(), best.report)
