"""The one transform: a float network in, a compressed one out."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from bgd_plugin.calibration import (
    Batch,
    Forward,
    LayerInputs,
    Walk,
    collect_batches,
    iterate_batches,
    logits_of,
    require_rewalkable,
    sampled_inputs,
)
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.fitting import METHODS, FittedLayer, LayerContext, output_error
from bgd_plugin.graph import (
    FoundLayer,
    copy_module,
    following_batchnorm,
    isolate_weights_,
    layer_has_bias,
    set_modes,
    swap_,
    trace,
)
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.plan import Plan, PlannedLayer, make_plan, paper_bytes
from bgd_plugin.report import LayerReport, Report
from bgd_plugin.run import Run
from bgd_plugin.storage import file_size, round_floats_, stored
from bgd_plugin.training import absorb_row_scale_, correct_batchnorm_, distill_, finetune_, is_batchnorm, kl_to_teacher
from bgd_plugin.training.finetuning import total_steps

__all__ = ["Quantized", "quantize"]

logger = logging.getLogger(__name__)

_ERROR_ROWS = 4096


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns."""

    model: fx.GraphModule
    report: Report


@dataclass(kw_only=True)
class _Job:
    """Everything that the steps of one call share."""

    student: fx.GraphModule
    reference: fx.GraphModule
    teacher: nn.Module
    config: BGDConfig
    plan: Plan
    found: list[FoundLayer]
    batches: list[Batch]
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


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    config: BGDConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    forward: Forward | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Quantized:
    """Compress a network by product quantization of its weights, keeping what its layers compute on real inputs.

    Args:
        model: the float network; it is left untouched.
        calibration: batches of unlabelled inputs. A batch is a tensor, a sequence whose first item is the input, or a
            mapping of keyword arguments. Finetuning walks it several times.
        config: what to quantize and how; `BGDConfig()` if not given.
        teacher: network whose logits distillation and finetuning follow; the float model if not given.
        forward: `callable(model, batch)` for batches of any other form.
        checkpoint: folder for the finished layers; a call with the same arguments goes on from them.
        progress: show a progress bar.

    Returns:
        the compressed network, and a report.

    Raises:
        BGDError: one of its subclasses; the message names the layer, what was found, and what to do.
    """
    config = config or BGDConfig()
    _check_model(model)
    if config.finetuning:
        require_rewalkable(calibration, "finetuning")
    student = trace(copy_module(model))
    modes = {path: module.training for path, module in student.named_modules()}
    plan, found = make_plan(student, config, original=model)
    isolate_weights_(student, found)
    student.eval()
    device = next(student.parameters()).device
    batches = collect_batches(calibration, model, device=device, forward=forward)
    with _progress_bar(config, plan, batches, progress) as bar:
        job = _Job(
            student=student,
            reference=copy_module(student, share_tensors=True),
            teacher=_teacher(teacher or model, device),
            config=config,
            plan=plan,
            found=found,
            batches=batches,
            run=Run.open(checkpoint, model, config, batches, teacher),
            bar=bar,
        )
        if teacher is not None:
            _check_teacher(job)
        results = _quantize_layers(job)
        if config.finetuning:
            _finetune(job, calibration, forward)
    if config.float_storage == "float16":
        round_floats_(student)
    _restore(student, model, found, modes)
    return Quantized(student, _report(job, results))


def _check_model(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"{name!r} is on the meta device, without values: such a network can be planned, not quantized"
            )
        is_learnt = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
        if is_learnt and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{name!r} of the network holds NaN or infinite values: repair the network first")


def _progress_bar(config: BGDConfig, plan: Plan, batches: list[Batch], progress: bool) -> Any:
    steps = len(plan.layers) * (1 + (config.distillation.steps if config.distillation else 0))
    steps += total_steps(config.finetuning, len(batches)) if config.finetuning else 0
    return tqdm(total=steps, disable=not progress, desc="quantize", unit="step", dynamic_ncols=True)


def _teacher(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in evaluation mode on `device`; the user's network keeps its own mode and device."""
    parameter = next(model.parameters(), None)
    moves = parameter is not None and parameter.device != device
    copied: nn.Module = copy_module(model, share_tensors=not moves)
    return (copied.to(device) if moves else copied).eval()


@torch.no_grad()
def _check_teacher(job: _Job) -> None:
    """Compare a teacher's logits with the network's on one batch, before any work is done."""
    if not (job.config.distillation or job.config.finetuning):
        job.notes.append("the teacher was not used: neither distillation nor finetuning is on")
        return
    batch = job.batches[0]
    kl_to_teacher(logits_of(batch.call(job.reference)), logits_of(batch.call(job.teacher)))


def _quantize_layers(job: _Job) -> list[LayerReport]:
    """Layer after layer, in one walk over the graph."""
    job.student.requires_grad_(False)
    walk = Walk(job.student, job.batches, job.reference if _needs_reference(job.config) else None)
    first_nodes = {_first_node(walk, found): index for index, found in enumerate(job.found)}
    logits = _teacher_logits(job)
    reports: list[LayerReport] = []
    corrected = 0
    for node in walk.nodes():
        if node.name in first_nodes:
            index = first_nodes[node.name]
            reports.append(_quantize_layer(job, walk, index, logits))
        elif job.config.batchnorm != "keep" and is_batchnorm(job.student, node):
            with job.timed("batch norm"):
                if correct_batchnorm_(walk, node, job.config.batchnorm):
                    walk.mark_changed(str(node.target))
                    corrected += 1
    job.seconds["forward"] = walk.seconds
    if job.config.batchnorm != "keep":
        what = f"{corrected} corrected" if corrected else "nothing to correct, no batch norm follows a quantized layer"
        job.notes.append(f"batch norm ({job.config.batchnorm}): {what}")
    return reports


def _needs_reference(config: BGDConfig) -> bool:
    return config.batchnorm == "matched" or config.method == "full"


def _first_node(walk: Walk, layer: FoundLayer) -> str:
    """The node before which a layer is fitted: its first call, or the node that reads its weight for that call."""
    for node in walk.order:
        if (node.op == "call_module" and node.target == layer.target) or node.name == layer.calls[0]:
            return node.name
    raise AssertionError(f"{layer.name} has no node")


def _quantize_layer(job: _Job, walk: Walk, index: int, logits: list[Tensor]) -> LayerReport:
    """Fit one layer, put it in its place, distill it."""
    found, planned, config = job.found[index], job.plan.layers[index], job.config
    job.bar.set_description(planned.name)
    generator = job.generator(planned.name)
    inputs = LayerInputs(walk, planned.name, planned.calls)
    with job.timed("statistics"):
        sample = sampled_inputs(inputs, _ERROR_ROWS, job.generator(f"{planned.name} sample"))
    module = job.student.get_submodule(planned.target)
    finished = job.run.finished(index, planned)
    fit = finished or _fit(job, found, planned, inputs, generator)
    layer = quantized(module, fit.codebook.to(found.weight), fit.codes.to(found.weight.device))
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
    job: _Job,
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
        has_batchnorm=following_batchnorm(job.student, found.calls) is not None,
        has_bias=layer_has_bias(job.student, found),
        config=job.config,
    )
    with job.timed("statistics"):
        statistics = method.collect(context, generator)
    with job.timed("fit"):
        return method.solve(context, statistics, generator)


@torch.no_grad()
def _apply_shifts(job: _Job, layer: PQModule, found: FoundLayer, fit: FittedLayer) -> None:
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
def _teacher_logits(job: _Job) -> list[Tensor]:
    """The teacher's answer to each calibration batch, where distillation needs it."""
    if not job.config.distillation:
        return []
    with job.timed("teacher"):
        return [logits_of(batch.call(job.teacher)) for batch in job.batches]


def _finetune(job: _Job, calibration: Iterable[Any], forward: Forward | None) -> None:
    assert job.config.finetuning
    device = next(job.student.parameters()).device

    def epoch() -> Iterator[Batch]:
        return iterate_batches(calibration, job.student, device=device, forward=forward)

    job.bar.set_description("finetune")
    with job.timed("finetune"):
        loss = finetune_(job.student, job.teacher, epoch, len(job.batches), job.config.finetuning, job.bar.update)
    job.notes.append(f"finetuning: final loss {loss:.4g}")


def _restore(student: fx.GraphModule, model: nn.Module, found: list[FoundLayer], modes: dict[str, bool]) -> None:
    """Give the student the training modes and the gradient flags of the user's network."""
    set_modes(student, modes)
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    for layer in found:
        module: Any = student.get_submodule(layer.target)
        module.codebook.requires_grad_(flags[layer.target if layer.functional else f"{layer.target}.weight"])


def _report(job: _Job, layers: list[LayerReport]) -> Report:
    content = stored(job.student)
    return Report(
        layers=tuple(layers),
        skipped=job.plan.skipped,
        original_bytes=job.plan.original_bytes,
        compressed_bytes=file_size(content),
        paper_bytes=paper_bytes(job.student),
        seconds=job.seconds,
        notes=tuple(job.notes),
    )


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
