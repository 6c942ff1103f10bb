"""One pass of a run: choose the sizes, fit the layers, and judge the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from bgd_plugin.calibration import Batch, Batches, Forward, take_aside_
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import batchnorms_in_parts, copy_module, isolate_weights_
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.choosing import choose_sizes
from bgd_plugin.planning.measure import Measurements, measured
from bgd_plugin.planning.survey import Survey
from bgd_plugin.quantization.finish import finish, reported, restore_
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.judge import judged
from bgd_plugin.quantization.layerwise import quantize_layers
from bgd_plugin.quantization.prepare import Prepared, prepared, prepared_for
from bgd_plugin.quantization.progress_bar import progress_bar
from bgd_plugin.quantization.resume import Fits, Run
from bgd_plugin.quantization.settle import settled
from bgd_plugin.quantization.train import check_teacher, teacher_for, train
from bgd_plugin.report.report import Quantized
from bgd_plugin.support.log import Log
from bgd_plugin.support.processes import is_first

__all__ = ["Task"]


@dataclass(kw_only=True)
class Task:
    """What the passes of one `quantize` call share.

    Attributes:
        model: the float network.
        calibration: as it was given, for training.
        config, forward, progress, original_bytes: as they were given.
        teacher: the network whose logits training matches; the float network if None.
        checkpoint: folder for progress.
        batches: the calibration data; from the first pass on without the samples kept aside.
        ready: the network that the first pass compresses in place.
        aside: samples that judge the answers.
        measurements: of the layers whose sizes are chosen; None where none are.
        factor: by which the first pass corrected what they promise.
        fits: of the last pass, by layer name; the next one fits layers of other sizes only.
        log: the seconds of what is done once for all passes.
    """

    model: nn.Module
    calibration: Iterable[Any]
    config: BGDConfig
    teacher: nn.Module | None
    forward: Forward | None
    checkpoint: Path | None
    progress: bool
    original_bytes: int | None
    batches: Batches
    ready: Prepared | None
    aside: Sequence[Batch] = ()
    measurements: Measurements | None = None
    factor: float = 1.0
    fits: Fits = field(default_factory=dict)
    log: Log = field(default_factory=Log)

    def run(self, realized: float, number: int) -> Quantized:
        """Compress the network.

        Args:
            realized: measured divergence over expected divergence, as far as earlier passes have shown it.
            number: of the pass, from 0.
        """
        ready = self._network(number)
        run = self._progress(number)
        if number == 0:
            self._measure(ready)
        log = Log()
        log.seconds.update(self.log.seconds)
        survey = ready.survey
        if ready.budget is not None:
            with log.timed("budget"):
                survey = self._chosen(ready.budget, realized, number)
        log.note(*survey.notes)
        result = self._fitted(ready, survey, run, log)
        self.fits = run.fits
        return result

    def _chosen(self, budget: Budget, realized: float, number: int) -> Survey:
        """The sizes; the first pass tries all errors together, on the float network."""
        assert self.measurements is not None
        if number == 0:
            survey, self.factor = choose_sizes(budget, self.measurements)
            return survey
        sensitivities, factor = self.measurements.sensitivities, realized * self.factor
        survey = budget.spend(sensitivities, factor)
        return dataclasses.replace(survey, curve=budget.curve(sensitivities, factor))

    def _network(self, number: int) -> Prepared:
        if number == 0:
            assert self.ready is not None
            ready, self.ready = self.ready, None
            return ready
        first = prepared(self.model, self.config, self.original_bytes)
        return prepared_for(first, self.model, self.config, self.original_bytes, self.batches)

    def _progress(self, number: int) -> Run:
        folder = self.checkpoint if is_first() else None
        if folder is not None and number:
            folder = folder / f"pass-{number + 1}"
        return Run.open(folder, self.model, self.config, self.batches, self.teacher, self.fits)

    def _measure(self, ready: Prepared) -> None:
        """Keep samples aside, and measure what each layer's error does to the output."""
        self.aside = take_aside_(self.batches, self.config.kept_aside)
        if ready.budget is not None:
            with self.log.timed("budget"):
                self.measurements = measured(ready.budget, self.batches, progress=self.progress)

    def _fitted(self, ready: Prepared, survey: Survey, run: Run, log: Log) -> Quantized:
        student, model, config = ready.front.network, self.model, self.config
        learnt = {layer.target: layer.weight.requires_grad for layer in survey.found}
        isolate_weights_(student, survey.found)
        reference = copy_module(student, share_tensors=True)
        device = next(model.parameters()).device
        with progress_bar(survey, self.batches.given, shown=self.progress) as bar, run.says_how_to_go_on():
            job = Job(
                student=student,
                reference=reference,
                teacher=teacher_for(model if self.teacher is None else self.teacher, config, device),
                config=config,
                survey=survey,
                norms={} if isinstance(student, fx.GraphModule) else batchnorms_in_parts(student),
                batches=self.batches,
                aside=self.aside,
                run=run,
                bar=bar,
                log=log,
            )
            check_teacher(job, is_given=self.teacher is not None)
            outcomes = quantize_layers(job)
            train(job, self.calibration, self.forward)
        result = settled(ready.front, student, self.batches)
        compressed_bytes, answers = finish(job, result), judged(job, result)
        restore_(result, model, learnt)
        return Quantized(result, reported(job, result, outcomes, compressed_bytes, answers))
