"""Layer after layer, in one walk over the graph: fit it, put it in its place, distill it, correct what follows."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batches, LayerInputs, Walk, logits_of, sampled_inputs
from bgd_plugin.config import BGDConfig
from bgd_plugin.fitting import METHODS, FittedLayer, LayerContext, output_error
from bgd_plugin.graph import FoundLayer, following_batchnorm, layer_has_bias, swap_
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.plan import Plan, PlannedLayer
from bgd_plugin.report import LayerReport
from bgd_plugin.run import Run
from bgd_plugin.training import absorb_row_scale_, correct_batchnorm_, distill_, is_batchnorm, is_shared

__all__ = ["Job", "quantize_layers"]

# The rows on which a layer's error is told: so many, but no more numbers than this.
_ERROR_ROWS, _ERROR_NUMBERS = 4096, 8_000_000


@dataclass(kw_only=True)
class Job:
    """Everything that the steps of one call share."""

    student: fx.GraphModule
    reference: fx.GraphModule
    teacher: nn.Module
    config: BGDConfig
    plan: Plan
    found: list[FoundLayer]
    batches: Batches
    run: Run
    bar: Any
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of a block to a step's."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of a layer, the same whichever layers were done before."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {name}".encode()))


def quantize_layers(job: Job) -> list[LayerReport]:
    """Layer after layer, in one walk over the graph."""
    job.student.requires_grad_(False)
    walk = Walk(job.student, job.batches, job.reference if _needs_reference(job.config) else None)
    first_nodes = {_first_node(walk, found): index for index, found in enumerate(job.found)}
    logits = _teacher_logits(job)
    reports: list[LayerReport] = []
    corrected, shared = 0, set()
    for node in walk.nodes():
        if node.name in first_nodes:
            index = first_nodes[node.name]
            reports.append(_quantize_layer(job, walk, index, logits))
        elif job.config.batchnorm != "keep" and is_batchnorm(job.student, node):
            if is_shared(job.student, node):
                shared.add(str(node.target))
                continue
            with job.timed("batch norm"):
                if correct_batchnorm_(walk, node, job.config.batchnorm):
                    walk.mark_changed(str(node.target))
                    corrected += 1
    job.seconds["forward"] = walk.seconds
    if job.config.batchnorm != "keep":
        what = f"{corrected} corrected" if corrected else "nothing to correct, no batch norm follows a quantized layer"
        job.notes.append(f"batch norm ({job.config.batchnorm}): {what}")
    if shared:
        job.notes.append(f"batch norm: left as they are, since they run at several places: {', '.join(sorted(shared))}")
    return reports


def _needs_reference(config: BGDConfig) -> bool:
    return config.batchnorm == "matched" or config.method == "full"


def _first_node(walk: Walk, layer: FoundLayer) -> str:
    """The node before which a layer is fitted: its first call, or the node that reads its weight for that call."""
    for node in walk.order:
        if (node.op == "call_module" and node.target == layer.target) or node.name == layer.calls[0]:
            return node.name
    raise AssertionError(f"{layer.name} has no node")


def _quantize_layer(job: Job, walk: Walk, index: int, logits: list[Tensor]) -> LayerReport:
    """Fit one layer, put it in its place, distill it."""
    found, planned, config = job.found[index], job.plan.layers[index], job.config
    job.bar.set_description(planned.name)
    generator = job.generator(planned.name)
    inputs = LayerInputs(walk, planned.name, planned.calls)
    with job.timed("statistics"):
        rows = min(_ERROR_ROWS, _ERROR_NUMBERS // found.weight[0].numel())
        sample = sampled_inputs(inputs, max(1, rows), job.generator(f"{planned.name} sample"))
    module = job.student.get_submodule(planned.target)
    finished = job.run.finished(index, planned)
    fit = finished or _fit(job, found, planned, inputs, generator)
    layer = quantized(
        module, fit.codebook.to(found.weight), fit.codes.to(found.weight.device), planned.kept(found.weight)
    )
    swap_(job.student, planned.target, layer)
    _apply_shifts(job, layer, found, fit)
    walk.mark_changed(planned.target)
    if config.distillation and finished is None:
        with job.timed("distill"):
            distill_(walk, layer, logits, config.distillation, generator, job.bar.update)
    if finished is None:
        job.run.store(index, dataclasses.replace(fit, codebook=layer.codebook, codes=layer.codes))
    elif config.distillation:
        job.bar.update(config.distillation.steps)
    job.bar.update()
    layer.requires_grad_(False)
    error = output_error(found.weight, _unscaled(layer.weight, fit.row_scale), sample)
    return _layer_report(planned, error, fit.note)


def _fit(
    job: Job,
    found: FoundLayer,
    planned: PlannedLayer,
    inputs: LayerInputs,
    generator: torch.Generator,
) -> FittedLayer:
    method = METHODS[job.config.method]
    context = LayerContext(
        layer=planned,
        weight=found.weight,
        inputs=inputs,
        mask=planned.kept(found.weight),
        has_batchnorm=following_batchnorm(job.student, found.calls) is not None,
        has_bias=layer_has_bias(job.student, found),
        config=job.config,
    )
    with job.timed("statistics"):
        statistics = method.collect(context, generator)
    with job.timed("fit"):
        return method.solve(context, statistics, generator)


@torch.no_grad()
def _apply_shifts(job: Job, layer: PQModule, found: FoundLayer, fit: FittedLayer) -> None:
    """Give the layer's neighbours what the fit left to them: a factor on each row, and a shift of the bias."""
    if fit.row_scale is not None:
        target = following_batchnorm(job.student, found.calls)
        absorb_row_scale_(job.student.get_submodule(str(target)), fit.row_scale)
    bias = getattr(layer, "bias", None)
    if fit.bias_shift is not None and bias is not None:
        layer.bias = torch.nn.Parameter(bias + fit.bias_shift.to(bias), requires_grad=False)


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


def _layer_report(planned: PlannedLayer, error: float, note: str) -> LayerReport:
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
