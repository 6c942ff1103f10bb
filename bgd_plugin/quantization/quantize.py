"""The one transform: a float network in, a compressed one out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from tqdm import tqdm

from bgd_plugin.calibration import (
    Batch,
    BatchStore,
    Forward,
    collect_batches,
    iterate_batches,
    logits_of,
    require_rewalkable,
)
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.format import file_size, stored
from bgd_plugin.files.rounding import round_floats_, round_weights_
from bgd_plugin.graph import (
    baked,
    copy_module,
    front_end,
    isolate_weights_,
    module_or_none,
    set_modes,
    unwrapped,
)
from bgd_plugin.nn import PQModule, freeze_norms_
from bgd_plugin.planning.candidates import Sensitivity
from bgd_plugin.planning.make import family_leftovers, free_layers, make_plan, require_plannable
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.planning.sizes import paper_bytes
from bgd_plugin.planning.types import Plan, SkippedLayer
from bgd_plugin.quantization.fingerprint import digest
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.layerwise import quantize_layers
from bgd_plugin.quantization.resume import Run
from bgd_plugin.report.report import LayerReport, Report
from bgd_plugin.support.processes import from_first, is_first, largest, processes, synchronize_, watched
from bgd_plugin.support.reproducible import if_asked
from bgd_plugin.support.tables import mib
from bgd_plugin.training import Epochs, finetune_, kl_to_teacher, reconstruct_, reconstruction_steps
from bgd_plugin.training.finetuning import total_steps

__all__ = ["Quantized", "quantize", "round_to_storage_"]

_LEAST_HALF = torch.finfo(torch.half).smallest_normal
_UNREACHED = "no calibration input reaches it"


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns."""

    model: nn.Module
    report: Report


@watched()
@if_asked
def quantize(
    model: nn.Module | ExportedProgram,
    calibration: Iterable[Any],
    config: BGDConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    forward: Forward | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory_bytes: int | None = None,
    reproducible: bool = False,
    progress: bool = True,
    original_bytes: int | None = None,
) -> Quantized:
    """Compress a network by product quantization of its weights, keeping what its layers compute on real inputs.

    Inside an initialised process group of `torch.distributed`, every process calls this with the same network and
    settings and its own part of the calibration data, and every process gets the same result.

    Args:
        model: the float network; it is left untouched. What `torch.export` gives goes in, too, and what comes out can
            be exported again.
        calibration: batches of unlabelled inputs. A batch is a tensor, a sequence whose first item is the input, or a
            mapping of keyword arguments. Finetuning walks it several times; a method `set_epoch(number)`, if it has
            one, is called before each of these walks, with 1, 2, 3 and so on.
        config: what to quantize and how; `BGDConfig()` if not given.
        teacher: network whose logits distillation and finetuning follow; the float model if not given.
        forward: `callable(model, batch)` for batches of any other form.
        checkpoint: folder for the progress: each finished layer, and training every half minute. A call with the same
            arguments goes on from there, and ends in the same bytes as one that was never stopped. Of several processes
            only the first one reads and writes it.
        memory_bytes: bound on what is held in memory of the calibration data and of the values that networks make of
            it; the rest lies in a temporary file. The result is the same. None: no bound.
        reproducible: compute on one thread, with torch's deterministic algorithms: the same bytes whatever the number
            of threads. Otherwise they are the same for the same number of threads.
        progress: show a progress bar.
        original_bytes: where this is the last step of a chain, the bytes of the network the chain started from, such as
            `plan(dense).original_bytes`: the report's ratio is then that of the whole chain.

    Returns:
        the compressed network, and a report.

    Raises:
        BGDError: one of its subclasses; the message names the layer, what was found, and what to do.
    """
    config = config or BGDConfig()
    model = baked(unwrapped(model))
    _check_model(model)
    _require_one_job(model, config)
    if memory_bytes is not None and memory_bytes < 1:
        raise ConfigError(f"memory_bytes={memory_bytes}: give a positive number of bytes, or None for no bound")
    if config.finetuning:
        require_rewalkable(calibration, "finetuning")
    student, folded = front_end(copy_module(model))
    modes = {path: module.training for path, module in student.named_modules()}
    set_modes(student, {"": False})
    if processes() > 1 and not isinstance(student, fx.GraphModule):
        raise ConfigError("this network does not trace, so its processes may come to different layers: use one process")
    if config.reconstruction and not isinstance(student, fx.GraphModule):
        raise ConfigError(
            "reconstruction works block by block along a graph, and this network does not trace: leave it out"
        )
    require_plannable(student, config, original=model, original_bytes=original_bytes)
    device = next(student.parameters()).device
    batches = collect_batches(calibration, model, device=device, forward=forward, memory_bytes=memory_bytes)
    run = Run.open(checkpoint if is_first() else None, model, config, batches, teacher)
    start = time.perf_counter()
    sensitivities = _sensitivities(student, batches, config, progress) if config.has_budget else None
    plan, found = make_plan(
        student, config, original=model, original_bytes=original_bytes, sensitivities=sensitivities, folded=folded
    )
    learnt = {layer.target: layer.weight.requires_grad for layer in found}
    leftovers = family_leftovers(student, config)
    seconds = {"budget": time.perf_counter() - start} if config.has_budget else {}
    isolate_weights_(student, found)
    with _progress_bar(student, config, plan, batches, progress) as bar:
        job = Job(
            student=student,
            reference=copy_module(student, share_tensors=True),
            teacher=_teacher(unwrapped(teacher) if teacher is not None else model, device),
            config=config,
            plan=plan,
            found=found,
            leftovers=leftovers,
            batches=batches,
            run=run,
            bar=bar,
            seconds=seconds,
            notes=list(plan.notes),
        )
        if teacher is not None:
            _check_teacher(job)
        with job.run.says_how_to_go_on():
            results = quantize_layers(job)
            if config.reconstruction:
                if is_first():  # of several processes, on its part of the data
                    _reconstruct(job)
                synchronize_(student)
            if config.finetuning:
                _finetune(job, calibration, forward)
    round_to_storage_(student, config, plan, leftovers)
    _keep_within_budget_(job)
    synchronize_(student)
    _restore(job, model, modes, learnt)
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


def _require_one_job(model: nn.Module, config: BGDConfig) -> None:
    """Of several processes, all must have the same network and settings.

    Raises:
        ConfigError: they have not.
    """
    if processes() > 1:
        content = digest([*model.state_dict().values(), config.to_json()])
        number = int(content[:12], 16)
        if -largest(-number) != largest(number):
            raise ConfigError(
                "the processes of this job have different networks or settings: load the same weights in each (the "
                "same seed, where they are random); only the calibration data is each process's own"
            )


def _sensitivities(
    student: nn.Module, batches: Sequence[Batch], config: BGDConfig, progress: bool
) -> dict[str, Sensitivity] | None:
    """What each layer whose size the budget chooses does to the output: the first process measures it, on its data.

    None where that cannot be measured.
    """
    if not isinstance(student, fx.GraphModule):
        return None
    names = [planned.name for _, planned in free_layers(student, config)]

    def measured() -> tuple[dict[str, Tensor], str]:
        with tqdm(total=len(names), disable=not progress, desc="measure", unit="layer", dynamic_ncols=True) as bar:
            found = measure_sensitivities(student, batches, names, config, bar.update)
        return {}, json.dumps({name: one.to_dict() for name, one in found.items()})

    text = from_first(measured)[1]
    return {name: Sensitivity.from_dict(values) for name, values in json.loads(text).items()}


def _progress_bar(student: nn.Module, config: BGDConfig, plan: Plan, batches: Sequence[Batch], progress: bool) -> Any:
    steps = len(plan.layers) * (1 + (config.distillation.steps if config.distillation else 0))
    if config.reconstruction and isinstance(student, fx.GraphModule):
        steps += reconstruction_steps(student, [layer.target for layer in plan.layers], config.reconstruction)
    steps += total_steps(config.finetuning, len(batches)) if config.finetuning else 0
    return tqdm(total=steps, disable=not (progress and is_first()), desc="quantize", unit="step", dynamic_ncols=True)


def _teacher(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in evaluation mode on `device`; the user's network keeps its own mode and device."""
    parameter = next(model.parameters(), None)
    moves = parameter is not None and parameter.device != device
    copied: nn.Module = copy_module(model, share_tensors=not moves)
    set_modes(copied, {"": False})
    return copied.to(device) if moves else copied


@torch.no_grad()
def _check_teacher(job: Job) -> None:
    """Compare a teacher's logits with the network's on one batch, before any work is done."""
    if not (job.config.distillation or job.config.finetuning):
        job.notes.append("the teacher was not used: neither distillation nor finetuning is on")
        return
    batch = job.batches[0]
    kl_to_teacher(logits_of(batch.call(job.reference)), logits_of(batch.call(job.teacher)))


def _reconstruct(job: Job) -> None:
    assert isinstance(job.student, fx.GraphModule) and isinstance(job.reference, fx.GraphModule)
    assert job.config.reconstruction
    job.bar.set_description("reconstruct")
    with job.timed("reconstruct"):
        gain = reconstruct_(
            job.student,
            job.reference,
            job.batches,
            job.config.reconstruction,
            lambda name: job.generator(f"{name} reconstruction"),
            lambda number: job.run.steps(f"block-{number:04d}", job.bar.update, is_shared=False),
        )
    job.notes.append(
        f"reconstruction: {gain.blocks} blocks, mean loss on samples kept aside {gain.before:.4g} → {gain.after:.4g}"
        + (f"; {gain.taken_back} put back as they were" if gain.taken_back else "")
    )


def _finetune(job: Job, calibration: Iterable[Any], forward: Forward | None) -> None:
    assert job.config.finetuning
    device = next(job.student.parameters()).device

    set_epoch = getattr(calibration, "set_epoch", None)

    def epoch(number: int) -> Iterator[Batch]:
        if set_epoch is not None:
            set_epoch(number + 1)  # the first walk, number 0, collected the batches
        return iterate_batches(calibration, job.student, device=device, forward=forward)

    job.bar.set_description("finetune")
    with job.timed("finetune"):
        data = Epochs(epoch, can_skip=set_epoch is not None or isinstance(calibration, (list, tuple)))
        steps = job.run.steps("finetuning", job.bar.update)
        first, last = finetune_(job.student, job.teacher, data, len(job.batches), job.config.finetuning, steps)
    job.notes.append(f"finetuning: final loss {last:.4g}, at first {first:.4g}")


def round_to_storage_(student: nn.Module, config: BGDConfig, plan: Plan, leftovers: list[str]) -> None:
    """Round everything to the type in which it will be stored."""
    for planned in plan.layers:
        layer = module_or_none(student, planned.target)
        if isinstance(layer, PQModule):
            layer.round_codebook_(planned.codebook_storage)
    if config.freeze_norms:
        freeze_norms_(student)
    round_weights_(student, leftovers, config.weight_storage)
    if config.float_storage == "float16":
        round_floats_(student)


@torch.no_grad()
def _keep_within_budget_(job: Job) -> None:
    """A bias or a mean that the run has moved next to zero is nothing that half precision holds: beyond the budget, it
    becomes zero.
    """
    target = job.config.budget_bytes(job.plan.original_bytes)
    if target is None or file_size(stored(job.student)) <= target:
        return
    names = [name for name, value in job.student.state_dict().items() if value.ndim == 1 and value.is_floating_point()]
    rounded = []
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = job.student.get_submodule(path)
        value: Any = getattr(owner, attribute)
        half = value.half().to(value)
        if 0 < float(value.abs().max()) < _LEAST_HALF and not torch.equal(half, value):
            value.copy_(half)
            rounded.append(name)
    if rounded:
        job.notes.append(f"budget: next to zero, and rounded to half precision to stay within it: {', '.join(rounded)}")


def _restore(job: Job, model: nn.Module, modes: dict[str, bool], learnt: dict[str, bool]) -> None:
    """Give the student the training modes and the gradient flags of the user's network."""
    set_modes(job.student, modes)
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in job.student.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    for target, is_learnt in learnt.items():
        module = module_or_none(job.student, target)
        if isinstance(module, PQModule):
            module.codebook.requires_grad_(is_learnt)


def _memory_note(store: BatchStore) -> str:
    peak, bound, spilled = mib(store.peak_bytes), mib(store.bound_bytes or 0), mib(store.spilled_bytes)
    note = f"calibration values: at most {peak} of {bound} in memory, {spilled} in a file"
    above = store.peak_bytes > (store.bound_bytes or 0)
    return f"{note}; a batch needs more than half of the bound: give smaller batches" if above else note


def _report(job: Job, layers: list[LayerReport]) -> Report:
    content = stored(job.student)
    if job.batches.store.bound_bytes is not None:
        job.notes.append(_memory_note(job.batches.store))
    return Report(
        layers=tuple(layers),
        skipped=(*job.plan.skipped, *(SkippedLayer(name=x.name, reason=_UNREACHED) for x in job.unreached)),
        original_bytes=job.plan.original_bytes,
        compressed_bytes=file_size(content),
        paper_bytes=paper_bytes(job.student),
        seconds=job.seconds,
        notes=tuple(job.notes),
    )
