"""Quantize one layer: fit it, insert it into the student, distill it, and record the outcome."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from bgd_plugin.calibration import LayerInputs, Rerun, Walk, embedding_inputs, sampled_inputs
from bgd_plugin.correction import DriftedSkip, absorb_row_scale_, row_scale_bounds, shift_biases_, shift_helps
from bgd_plugin.errors import CalibrationError
from bgd_plugin.fitting import (
    METHODS,
    FittedLayer,
    LayerContext,
    Skip,
    fit_weight,
    fitted_once,
    output_error,
    shift_gain,
)
from bgd_plugin.graph import FoundLayer, install_, module_at, module_or_none, release_
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.coded import as_coded
from bgd_plugin.planning.types import PlannedLayer, SkippedLayer
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.resume import stage
from bgd_plugin.quantization.spending import with_the_rest
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.training import distill_

__all__ = ["quantize_layer", "treat_unreached"]

_ERROR_ROWS = 1024, 4096
"""Rows sampled to measure a layer's error: as many as give a million outputs, within these bounds."""
_ERROR_NUMBERS = 1 << 20, 4_000_000
"""These outputs, and the most inputs."""


def quantize_layer(
    job: Job, walk: Walk | Rerun, index: int, logits: list[Tensor], skip: DriftedSkip | None
) -> LayerReport | SkippedLayer:
    """Fit one layer, insert it into the student, and distill it.

    Args:
        job: the run; its student is changed.
        walk: positioned at the layer.
        index: the layer's index among those to be quantized.
        logits: the teacher's logits per batch, `[batch, classes]`, if the layer is distilled.
        skip: the skip connection whose drift the layer compensates for.
    """
    found = job.survey.found[index]
    planned = with_the_rest(job.survey, job.student, index)
    job.bar.set_description(planned.name)
    with job.log.timed("statistics"):
        inputs = _inputs(job, walk, found)
        if found.hidden and found.kind != "embedding" and next(iter(inputs), None) is None:
            return treat_unreached(job, index)
        sample = sampled_inputs(inputs, _error_rows(found), job.generator(f"{planned.name} sample"))
    generator = job.generator(planned.name)
    finished = fitted_once(lambda: job.run.finished(index, planned))
    drifted = _skip_for_fit(job, walk, found, skip)
    fit = finished or _fit(job, found, planned, inputs, generator, drifted)
    if finished is None and fit.bias_shift is not None:
        fit = _judged_shift(job, found, fit, inputs, drifted)
    layer = _installed(job, walk, found, planned, fit)
    if finished is None:
        _distill(job, walk, index, layer, logits, generator)
        job.run.store(index, planned, dataclasses.replace(fit, codebook=layer.codebook, codes=layer.codes))
    elif job.config.distillation:
        job.bar.update(job.config.distillation.steps)
    job.bar.update()
    layer.requires_grad_(False)
    planned = as_coded(planned, layer)
    decoded = _unscaled(layer.matrix, fit.row_scale)
    return LayerReport.of(
        planned,
        relative_error=output_error(found.matrix, decoded, sample),
        bias_gain=None if fit.bias_shift is None else shift_gain(fit.bias_shift, decoded, sample),
        warnings=fit.warnings,
    )


def treat_unreached(job: Job, index: int) -> LayerReport | SkippedLayer:
    """A layer that no calibration input reaches stays float; with a budget it is fitted to its weight alone.

    Its effect is unknown, so it is better left as it is; a budget, however, counts on the bytes that it saves.

    Args:
        job: the run; its student is changed.
        index: the layer's index among those to be quantized.
    """
    found, planned = job.survey.chosen[index]
    job.bar.update(1 + (job.config.distillation.steps if job.config.distillation else 0))
    if not job.config.has_target:
        release_(job.student, found)
        return SkippedLayer(name=found.name, reason="no calibration input reaches it")
    matrix, mask = found.matrix.detach(), planned.kept(found.matrix)

    def solved() -> FittedLayer:
        gram = torch.eye(planned.block_size, device=matrix.device)
        return fit_weight(matrix, gram, planned, mask, job.config.em_iterations, job.generator(planned.name))

    fit = fitted_once(lambda: job.run.finished(index, planned)) or fitted_once(solved)
    assert fit is not None
    layer = _put_in(job, found, fit, mask)
    layer.requires_grad_(False)
    job.run.store(index, planned, dataclasses.replace(fit, codebook=layer.codebook, codes=layer.codes))
    planned = as_coded(planned, layer)
    lost = torch.linalg.vector_norm(matrix - layer.matrix) / torch.linalg.vector_norm(matrix).clamp(min=1e-30)
    warning = "no calibration input reaches it: fitted to its weight alone, to keep to the budget"
    return LayerReport.of(planned, relative_error=float(lost) ** 2, bias_gain=None, warnings=(*fit.warnings, warning))


def _judged_shift(job: Job, found: FoundLayer, fit: FittedLayer, inputs: LayerInputs, skip: Skip | None) -> FittedLayer:
    """The fit without its shift of the bias, where such a shift raises the error on samples kept aside."""
    decoded = fit.decoded(found.matrix.shape).to(found.weight)
    with job.log.timed("statistics"):
        helps = shift_helps(
            found.matrix, decoded, inputs, job.generator(f"{found.name} shift"), None if skip is None else skip.drift
        )
    if helps:
        return fit
    warning = "bias correction undone: the error rose on samples kept aside"
    return dataclasses.replace(fit, bias_shift=None, warnings=(*fit.warnings, warning))


def _error_rows(found: FoundLayer) -> int:
    (least, most), (outputs, inputs) = _ERROR_ROWS, _ERROR_NUMBERS
    return max(1, min(most, max(least, outputs // len(found.matrix)), inputs // found.columns))


def _inputs(job: Job, walk: Walk | Rerun, found: FoundLayer) -> LayerInputs:
    if found.kind == "embedding":
        return embedding_inputs(found.name, found.matrix)
    if isinstance(walk, Rerun):
        return walk.inputs(found.name, paired=job.config.method == "full")
    # hooks may change what a layer computes on: then it is watched
    is_watched = found.hidden or any(
        part._forward_pre_hooks
        for target in (found.target, *found.tied)
        if (part := module_or_none(job.student, target)) is not None
    )
    return LayerInputs(walk, found.name, found.calls, found.weight if is_watched else None)


def _fit(
    job: Job,
    found: FoundLayer,
    planned: PlannedLayer,
    inputs: LayerInputs,
    generator: torch.Generator,
    skip: Skip | None,
) -> FittedLayer:
    method = METHODS[job.config.method]
    norm = job.batchnorm_after(found)
    context = LayerContext(
        layer=planned,
        weight=found.matrix,
        inputs=inputs,
        mask=planned.kept(found.matrix),
        has_batchnorm=norm is not None,
        has_bias=found.bias is not None,
        config=job.config,
        skip=skip,
        scale_bounds=None if norm is None else row_scale_bounds(module_at(job.student, norm)),
    )
    with job.log.timed("statistics"):
        statistics = method.collect(context, generator)

    def solved() -> FittedLayer:
        try:
            return method.solve(context, statistics, generator)
        except (ValueError, LinAlgError) as error:
            raise CalibrationError(f"layer {found.name!r} cannot be fitted: {error}") from error

    with job.log.timed("fit"):
        fit = fitted_once(solved)
    assert fit is not None
    return fit


def _skip_for_fit(job: Job, walk: Walk | Rerun, found: FoundLayer, skip: DriftedSkip | None) -> Skip | None:
    if isinstance(walk, Rerun):
        return _skip_behind(job, walk, found)
    if skip is None:
        return None
    norm: Any = job.student.get_submodule(str(skip.norm.target))
    gain = (norm.running_var + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach()
    return Skip(drift=functools.partial(walk.drift, skip.node), gain=gain)


def _skip_behind(job: Job, walk: Rerun, found: FoundLayer) -> Skip | None:
    """The skip connection that a layer's output is added to, in a network without a graph."""
    is_plain = found.members == 1 and not found.tied and found.kind in ("linear", "conv1d", "conv2d", "conv3d")
    skip = walk.skip(found.name) if is_plain and job.config.method == "full" else None
    if skip is None:
        return None
    drift, stream = skip
    return Skip(
        drift=lambda batch: _positions_first(drift(batch), found),
        gain=torch.ones(found.rows),
        stream=(lambda batch: _positions_first(stream(batch), found)) if found.kind == "linear" else None,
    )


def _positions_first(values: Tensor, found: FoundLayer) -> Tensor:
    """Values of the shape of a layer's output, in the order of its unfolded inputs."""
    return values.flatten(0, -2) if found.kind == "linear" else values


def _installed(job: Job, walk: Walk | Rerun, found: FoundLayer, planned: PlannedLayer, fit: FittedLayer) -> PQModule:
    """Insert the layer's product-quantized module, and apply the fit's changes to neighbouring modules."""
    layer = _put_in(job, found, fit, planned.kept(found.matrix))
    _apply_shifts(job, found, fit)
    if isinstance(walk, Walk):
        for node in (planned.target, *found.tied, *(found.calls if found.hidden else ())):
            walk.mark_changed(node)
    return layer


def _put_in(job: Job, found: FoundLayer, fit: FittedLayer, mask: Tensor | None) -> PQModule:
    codebook, codes = fit.codebook.to(found.weight), fit.codes.to(found.weight.device)
    return install_(job.student, found, codebook, codes, mask, fit.form)[0]


@torch.no_grad()
def _apply_shifts(job: Job, found: FoundLayer, fit: FittedLayer) -> None:
    """Apply the fit's row scale to the following batch norm, and its shift to the bias."""
    norm = job.batchnorm_after(found)
    if fit.row_scale is not None:
        assert norm is not None
        absorb_row_scale_(module_at(job.student, norm), fit.row_scale)
    if fit.bias_shift is not None:
        shift_biases_(job.student, found, fit.bias_shift)


def _distill(
    job: Job, walk: Walk | Rerun, index: int, layer: PQModule, logits: list[Tensor], generator: torch.Generator
) -> None:
    if not job.config.distillation:
        return
    with job.log.timed("distill"):
        steps = job.run.steps(stage(index), job.bar.update)
        tokens = [batch.tokens(x) for batch, x in zip(job.batches, logits, strict=True)]
        distill_(walk, layer, logits, job.config.distillation, generator, steps, tokens=tokens)
        layer.round_codebook_(job.survey.layers[index].codebook_storage)


def _unscaled(weight: Tensor, row_scale: Tensor | None) -> Tensor:
    if row_scale is None:
        return weight
    return weight / row_scale.to(weight).reshape(-1, *(1 for _ in weight.shape[1:]))
