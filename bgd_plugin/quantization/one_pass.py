"""One pass of a run: choose the sizes, fit the layers, and judge the answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from torch import fx, nn

from bgd_plugin.calibration import Batch, Batches, Forward, Records, take_aside_
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import batchnorms_in_parts, copy_module, isolated_weights, untouched
from bgd_plugin.planning.budget import AIM, Budget
from bgd_plugin.planning.choosing import choose_sizes, energy_at, energy_left, realized_energy
from bgd_plugin.planning.measure import Measurements, measured
from bgd_plugin.planning.survey import Survey
from bgd_plugin.quantization.finish import restore_
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.judge import judged
from bgd_plugin.quantization.layerwise import quantize_layers
from bgd_plugin.quantization.prepare import Prepared
from bgd_plugin.quantization.progress_bar import progress_bar
from bgd_plugin.quantization.quality import Pass
from bgd_plugin.quantization.reported import reported, sized
from bgd_plugin.quantization.resume import Fits, Run
from bgd_plugin.quantization.settle import settled
from bgd_plugin.quantization.train import check_teacher, teacher_for, train
from bgd_plugin.support.log import Log
from bgd_plugin.support.processes import is_first

__all__ = ["Task"]

_SMALLER = 0.95
"""A further pass is worth its time if the file is expected to have no more than this share of the bytes."""


@dataclass(kw_only=True)
class Task:
    """What the passes of one `quantize` call share.

    Attributes:
        model: the float network.
        calibration: as it was given, for training.
        config, forward, progress: as they were given.
        teacher: the network whose logits training matches; the float network if None.
        checkpoint: folder for progress.
        batches: the calibration data; from the first pass on without the samples kept aside.
        ready: the network, its survey and its budget; each pass compresses a copy.
        learnt: whether a layer's weight requires gradients, by target.
        aside: samples that judge the answers.
        measurements: of the layers whose sizes are chosen; None where none are.
        energy: share of the layers' errors that is expected to be left.
        shown: the measured divergence of each pass, and the share that was left in it.
        fits: of the last pass, by layer name; the next one fits layers of other sizes only.
        records: of the float network's runs, see `Job`.
        log: the seconds of what is done once for all passes.
    """

    model: nn.Module
    calibration: Iterable[Any]
    config: BGDConfig
    teacher: nn.Module | None
    forward: Forward | None
    checkpoint: Path | None
    progress: bool
    batches: Batches
    ready: Prepared
    learnt: Mapping[str, bool]
    aside: Sequence[Batch] = ()
    measurements: Measurements | None = None
    energy: float = 1.0
    shown: list[tuple[float, float]] = field(default_factory=list)
    fits: Fits = field(default_factory=dict)
    records: dict[Any, Records] = field(default_factory=dict)
    log: Log = field(default_factory=Log)

    def once(self) -> Pass:
        """Compress the network in one pass."""
        result = self.run(0, None)
        assert result is not None
        return result

    def run(self, number: int, before: Pass | None) -> Pass | None:
        """Compress the network.

        Args:
            number: of the pass, from 0.
            before: the pass before this one.

        Returns:
            the pass; None if the one before it keeps the bound, and another one would hardly make its file smaller.
        """
        run = self._progress(0) if number == 0 else None  # a folder with another run is refused at once
        if number == 0:
            self._measure()
        if before is not None and not self._leaves_room(before):
            return None
        log = Log()
        log.seconds.update(self.log.seconds)
        survey = self.ready.survey
        if self.ready.budget is not None:
            with log.timed("budget"):
                survey = self._chosen(self.ready.budget, before)
                if before is not None and _same_sizes(before.survey, survey) and self._misses(before):
                    survey = self._chosen(self.ready.budget, before)  # its fit would be the same, and so is known
        if before is not None and not self._is_worth(before, survey):
            return None
        run = run or self._progress(number)
        if before is not None and not _begin_alike(before.survey, survey):
            run.forget_fits()
        log.note(*survey.notes)
        result = self._fitted(survey, run, log)
        self.fits = run.fits
        return result

    def _misses(self, before: Pass) -> bool:
        """Whether a pass has missed the bound."""
        return before.report.answers is not None and not before.report.answers.divergence <= before.limit

    def _leaves_room(self, before: Pass) -> bool:
        """Whether a file that is smaller by enough may keep the bound, by how steep the curve of sizes is there.

        Sizes are chosen anew only then: to try them takes time.
        """
        answers, curve = before.report.answers, [p for p in before.survey.curve if p.expected_divergence > 0]
        if answers is None or self.ready.budget is None or len(curve) < 2 or self._misses(before):
            return True
        found = self.ready.budget.sketch.file_size(before.survey.chosen, before.survey.storages)
        places = numpy.log([found, _SMALLER * found])
        now, smaller = numpy.interp(places, *numpy.log([(p.file_bytes, p.expected_divergence) for p in curve]).T)
        return bool(answers.divergence * math.exp(smaller - now) <= AIM * before.limit)

    def _is_worth(self, before: Pass, survey: Survey) -> bool:
        """Whether a further pass is needed to keep the bound, or makes the file smaller by enough."""
        answers, budget = before.report.answers, self.ready.budget
        if answers is None or budget is None or not answers.divergence <= before.limit:
            return True
        expected, found = (budget.sketch.file_size(one.chosen, one.storages) for one in (survey, before.survey))
        return expected <= _SMALLER * found

    def _chosen(self, budget: Budget, before: Pass | None) -> Survey:
        """The sizes, under what the pass before has shown of the errors that are left."""
        assert self.measurements is not None
        answers = None if before is None else before.report.answers
        with self.measurements.prepared():
            if before is None or answers is None:
                self.energy = energy_left(budget)
            else:
                left = realized_energy(self.measurements, before.survey, self.energy, answers.divergence)
                self.shown.append((answers.divergence, left))
                self.energy = energy_at(self.shown, AIM * self._limit)
            return choose_sizes(budget, self.measurements, self.energy)

    def _progress(self, number: int) -> Run:
        folder = self.checkpoint if is_first() else None
        if folder is not None and number:
            folder = folder / f"pass-{number + 1}"
        return Run.open(folder, self.model, self.config, self.batches, self.teacher, self.fits)

    def _measure(self) -> None:
        """Keep samples aside, and measure what each layer's error does to the output."""
        self.aside = take_aside_(self.batches, self.config.kept_aside)
        if self.ready.budget is not None:
            with self.log.timed("budget"):
                self.measurements = measured(self.ready.budget, self.batches, self.aside, progress=self.progress)

    def _fitted(self, survey: Survey, run: Run, log: Log) -> Pass:
        front = self.ready.front
        with (
            isolated_weights(front.network, survey.found),
            untouched(*{id(n): n for n in (front.network, front.own)}.values()) as (reference, *_),
            progress_bar(survey, self.batches.given, shown=self.progress) as bar,
            run.says_how_to_go_on(),
        ):
            job = self._job(survey, reference, run, bar, log)
            check_teacher(job, is_given=self.teacher is not None)
            outcomes = quantize_layers(job)
            train(job, self.calibration, self.forward)
            sizes = sized(job, front)
            answers = judged(job, self.measurements.scale.measure if self.measurements else None)
        return Pass(
            report=reported(job, outcomes, sizes, answers),
            network=functools.partial(self._settled, job.student, survey),
            survey=survey,
            limit=self._limit,
        )

    @property
    def _limit(self) -> float:
        """The largest divergence that the bound allows."""
        bound = self.config.bound or math.inf
        return bound if self.measurements is None else bound * self.measurements.scale.tolerance

    def _job(self, survey: Survey, reference: nn.Module, run: Run, bar: Any, log: Log) -> Job:
        student = copy_module(reference, share_tensors=True)
        device = next(self.model.parameters()).device
        return Job(
            student=student,
            reference=reference,
            teacher=teacher_for(self.model if self.teacher is None else self.teacher, self.config, device),
            config=self.config,
            survey=survey,
            norms={} if isinstance(student, fx.GraphModule) else batchnorms_in_parts(student),
            batches=self.batches,
            aside=self.aside,
            run=run,
            bar=bar,
            log=log,
            records=self.records,
        )

    def _settled(self, student: nn.Module, survey: Survey) -> nn.Module:
        result = settled(self.ready.front, student, survey, self.batches)
        restore_(result, self.model, self.learnt)
        return result


def _same_sizes(one: Survey, other: Survey) -> bool:
    """Whether all layers take the same sizes under two choices."""
    layers = [[(x.name, x.block_size, x.codebook_size, x.size_bytes) for x in survey.layers] for survey in (one, other)]
    return layers[0] == layers[1] and one.storages == other.storages


def _begin_alike(one: Survey, other: Survey) -> bool:
    """Whether layers get about the same inputs under two choices: tables and what stays float are stored alike.

    A fit makes good what was lost before its layer. Where a table had codes and has 8 bits now, it would make good what
    is not lost any more.
    """
    tables = [
        {(x.name, x.block_size, x.codebook_size, x.size_bytes) for x in survey.layers if x.family == "embedding"}
        for survey in (one, other)
    ]
    return tables[0] == tables[1] and one.storages == other.storages
