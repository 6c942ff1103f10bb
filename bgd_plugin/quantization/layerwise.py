"""Layer after layer, in one walk over the graph: fit it, put it in its place, distill it, correct what follows."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from bgd_plugin.calibration import CollectedInputs, LayerInputs, Rerun, Walk, logits_of, sampled_inputs
from bgd_plugin.config import BGDConfig
from bgd_plugin.correction import (
    DriftedSkip,
    Gain,
    NormCorrection,
    absorb_row_scale_,
    is_batchnorm,
    refitted,
    row_scale_bounds,
)
from bgd_plugin.errors import CalibrationError
from bgd_plugin.files.rounding import round_weights_
from bgd_plugin.fitting import METHODS, FittedLayer, LayerContext, Skip, fitted_once, output_error, shift_gain
from bgd_plugin.graph import (
    FoundLayer,
    added_to,
    batchnorms_in_parts,
    call_input,
    following_batchnorm_node,
    has_running_statistics,
    install_,
    module_at,
)
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import Geometry
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.resume import stage
from bgd_plugin.report.report import LayerReport
from bgd_plugin.training import distill_

__all__ = ["layer_report", "quantize_layers"]

# The rows on which a layer's error is told: so many, but no more numbers than this.
_ERROR_ROWS, _ERROR_NUMBERS = 4096, 4_000_000
_EMBEDDING_ROWS = 5  # one of them judges the fit of the others


def quantize_layers(job: Job) -> list[LayerReport]:
    """Layer after layer, in the order in which they run."""
    job.student.requires_grad_(False)
    logits = _teacher_logits(job)
    (_along_graph if isinstance(job.student, fx.GraphModule) else _by_runs)(job, logits)
    if job.shift_gains:
        gain = statistics.median(job.shift_gains)
        job.notes.append(
            f"bias (matched): {len(job.shift_gains)} shifted, which takes {gain:.2%} of their outputs' variance off "
            "the error (median)"
        )
    return job.reports


def _along_graph(job: Job, logits: list[Tensor]) -> None:
    """One walk over the graph."""
    assert isinstance(job.student, fx.GraphModule) and isinstance(job.reference, fx.GraphModule)
    walk = Walk(job.student, job.batches, job.reference if _needs_reference(job.config) else None)
    first_nodes: dict[str, list[int]] = {}
    for index, found in enumerate(job.found):
        first_nodes.setdefault(_first_node(walk, found), []).append(index)
    norms = NormCorrection(job.student, job.config.batchnorm, job.timed)
    refits: list[Gain] = []
    leftovers = _leftover_nodes(job)
    for node in walk.nodes():
        for index in first_nodes.get(node.name, ()):
            skip = _drifted_skip(job, walk, job.found[index])
            norms.remember(skip)
            _quantize_layer(job, walk, index, logits, skip)
        if node.name in leftovers:
            with job.timed("refit"):
                gain = _refit(job, walk, *leftovers[node.name])
            refits += [gain] if gain else []
        elif is_batchnorm(job.student, node):
            norms.correct_(walk, node)
    job.seconds["forward"] = walk.seconds
    if refits:
        job.notes.append(
            f"{len(refits)} depthwise convolutions, which stay float, were fitted anew to the inputs they now get, "
            f"{Gain.said(refits)}"
        )
    job.notes += norms.notes()


def _by_runs(job: Job, logits: list[Tensor]) -> None:
    """The same for a network that is not a graph: it is run again for each layer and each batch norm."""
    indices = {found.name: index for index, found in enumerate(job.found)}
    norms = [path for path, module in job.student.named_modules() if has_running_statistics(module)]
    weights = {found.name: found.weight for found in job.found}
    walk = Rerun(job.student, job.reference, job.batches, weights, norms)
    job.norms.update(batchnorms_in_parts(job.student))
    corrections = NormCorrection(job.student, job.config.batchnorm, job.timed)
    for name in walk.order:
        if name in indices:
            _quantize_layer(job, walk, indices[name], logits, None)
        elif job.reports:
            corrections.correct_at_(walk, name)
    for name in indices.keys() - set(walk.order):
        job.leave(indices[name])
    if walk.strayed:
        names = ", ".join(sorted(walk.strayed))
        job.notes.append(f"fitted to their own inputs alone, since the float network takes another way: {names}")
    job.seconds["forward"] = walk.seconds
    job.notes += corrections.notes()


def _needs_reference(config: BGDConfig) -> bool:
    return config.batchnorm == "matched" or config.method == "full"


def _first_node(walk: Walk, layer: FoundLayer) -> str:
    """The node before which a layer is fitted: its first call, or the node that reads its weight for that call."""
    for node in walk.order:
        if (node.op == "call_module" and node.target in (layer.target, *layer.tied)) or node.name == layer.calls[0]:
            return node.name
    raise AssertionError(f"{layer.name} has no node")


def _drifted_skip(job: Job, walk: Walk, found: FoundLayer) -> DriftedSkip | None:
    """The skip whose drift a layer is to make good: it ends a residual branch, and the other side has run already."""
    config = job.config
    if config.method != "full" or not config.asymmetric_step or config.batchnorm != "matched":
        return None
    assert isinstance(job.student, fx.GraphModule)
    if job.batchnorm_after(found) is None:
        return None
    norm = following_batchnorm_node(job.student, found.calls)
    skip = None if norm is None else added_to(job.student, norm)
    return None if norm is None or skip is None or not walk.differs(skip) else DriftedSkip(norm=norm, node=skip)


def _leftover_nodes(job: Job) -> dict[str, tuple[str, fx.Node]]:
    """For each node at which a layer that stays float is due: the name of its weight, and the call that uses it."""
    due: dict[str, tuple[str, fx.Node]] = {}
    assert isinstance(job.student, fx.GraphModule)
    for node in job.student.graph.nodes:
        if node.op == "call_module" and f"{node.target}.weight" in job.leftovers:
            due[node.name] = f"{node.target}.weight", node
        elif node.op == "get_attr" and node.target in job.leftovers and len(node.users) == 1:
            due[node.name] = str(node.target), next(iter(node.users))
    return due


def _refit(job: Job, walk: Walk, weight_name: str, call: fx.Node) -> Gain | None:
    """A layer that stays float: a depthwise one is fitted anew; each is rounded as it will be stored."""
    gain = None
    config = job.config
    path, _, attribute = weight_name.rpartition(".")
    owner = job.student.get_submodule(path)
    weight: Any = owner._parameters[attribute]
    is_refitted = (
        config.refit_depthwise
        and config.method == "full"
        and weight.shape[1] == 1
        and walk.differs_at(call_input(call))
    )
    if is_refitted:
        weight, gain = refitted(weight, LayerInputs(walk, path, [call.name]), job.generator(f"{path} refit"))
        # a new parameter: the reference may share the old one
        owner._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
    round_weights_(job.student, [weight_name], config.weight_storage)
    if is_refitted or config.weight_storage != "float32":
        walk.mark_changed(path if call.op == "call_module" else weight_name)
    return gain


def _quantize_layer(job: Job, walk: Walk | Rerun, index: int, logits: list[Tensor], skip: DriftedSkip | None) -> None:
    """Fit one layer, put it in its place, distill it."""
    found, planned, config = job.found[index], job.plan.layers[index], job.config
    job.bar.set_description(planned.name)
    generator = job.generator(planned.name)
    with job.timed("statistics"):
        inputs = _inputs(job, walk, found)
        if found.hidden and found.kind != "embedding" and next(iter(inputs), None) is None:
            job.leave(index)
            return
        rows = min(_ERROR_ROWS, _ERROR_NUMBERS // found.columns)
        sample = sampled_inputs(inputs, max(1, rows), job.generator(f"{planned.name} sample"))
    finished = fitted_once(lambda: job.run.finished(index, planned))
    fit = finished or _fit(job, found, planned, inputs, generator, _skip_for_fit(job, walk, skip))
    codebook, codes = fit.codebook.to(found.weight), fit.codes.to(found.weight.device)
    layer, *_ = install_(job.student, found, codebook, codes, planned.kept(found.matrix))
    _apply_shifts(job, found, fit)
    if isinstance(walk, Walk):
        for node in (planned.target, *found.tied, *(found.calls if found.hidden else ())):
            walk.mark_changed(node)
    if config.distillation and finished is None:
        with job.timed("distill"):
            steps = job.run.steps(stage(index), job.bar.update)
            tokens = [batch.tokens(x) for batch, x in zip(job.batches, logits, strict=True)]
            distill_(walk, layer, logits, config.distillation, generator, steps, tokens=tokens)
            layer.round_codebook_(planned.codebook_storage)
    if finished is None:
        job.run.store(index, dataclasses.replace(fit, codebook=layer.codebook, codes=layer.codes))
    elif config.distillation:
        job.bar.update(config.distillation.steps)
    job.bar.update()
    layer.requires_grad_(False)
    decoded = _unscaled(layer.matrix, fit.row_scale)
    error = output_error(found.matrix, decoded, sample)
    if fit.bias_shift is not None and found.bias is not None:
        job.shift_gains.append(shift_gain(fit.bias_shift, decoded, sample))
    job.reports.append(layer_report(planned, error, fit.note))


def _inputs(job: Job, walk: Walk | Rerun, found: FoundLayer) -> LayerInputs:
    if (
        found.kind == "embedding"
    ):  # its outputs are its weights: as if each column were an input of its own, a few times
        rows = torch.eye(found.columns, dtype=torch.float32, device=found.weight.device).repeat(_EMBEDDING_ROWS, 1)
        calls = [[(rows, Geometry.linear())]]
        return CollectedInputs(found.name, calls, calls)
    if isinstance(walk, Rerun):
        return walk.inputs(found.name, paired=job.config.method == "full")
    return LayerInputs(walk, found.name, found.calls, found.weight if found.hidden else None)


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
    with job.timed("statistics"):
        statistics = method.collect(context, generator)

    def solved() -> FittedLayer:
        try:
            return method.solve(context, statistics, generator)
        except (ValueError, LinAlgError) as error:
            raise CalibrationError(f"layer {found.name!r} cannot be fitted: {error}") from error

    with job.timed("fit"):
        fit = fitted_once(solved)
    assert fit is not None
    return fit


def _skip_for_fit(job: Job, walk: Walk | Rerun, skip: DriftedSkip | None) -> Skip | None:
    if skip is None or isinstance(walk, Rerun):
        return None
    norm: Any = job.student.get_submodule(str(skip.norm.target))
    gain = (norm.running_var + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach()
    return Skip(drift=functools.partial(walk.drift, skip.node), gain=gain)


@torch.no_grad()
def _apply_shifts(job: Job, found: FoundLayer, fit: FittedLayer) -> None:
    """Give the layer's neighbours what the fit left to them: a factor on each row, and a shift of the bias."""
    norm = job.batchnorm_after(found)
    if fit.row_scale is not None and norm is not None:
        absorb_row_scale_(module_at(job.student, norm), fit.row_scale)
    if fit.bias_shift is None or found.bias is None:
        return
    biases = [found.bias, *(f"{target}.bias" for target in found.tied if not found.functional)]
    shifted: dict[int, nn.Parameter] = {}
    for path in biases:
        owner_path, _, name = path.rpartition(".")
        owner = module_at(job.student, owner_path)
        bias = owner._parameters.get(name)
        if bias is not None:
            value = nn.Parameter(bias + fit.bias_shift.to(bias), requires_grad=False)
            owner._parameters[name] = shifted.setdefault(id(bias), value)


def _unscaled(weight: Tensor, row_scale: Tensor | None) -> Tensor:
    if row_scale is None:
        return weight
    return weight / row_scale.to(weight).reshape(-1, *(1 for _ in weight.shape[1:]))


@torch.no_grad()
def _teacher_logits(job: Job) -> list[Tensor]:
    """The teacher's answer to each calibration batch, where distillation needs it."""
    if not job.config.distillation:
        return []
    with job.timed("teacher"):
        return [logits_of(batch.call(job.teacher)) for batch in job.batches]


def layer_report(planned: PlannedLayer, error: float, note: str) -> LayerReport:
    """What the report says of a layer that is done."""
    return LayerReport(
        name=planned.name,
        kind=planned.kind,
        block_size=planned.block_size,
        codebook_size=planned.codebook_size,
        weights=planned.weights,
        bits_per_weight=planned.bits_per_weight,
        compressed_bytes=planned.compressed_bytes,
        relative_error=error,
        note="; ".join(filter(None, (planned.note, note))),
    )
