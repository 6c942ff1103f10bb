"""The steps of a pass: what each is given, and what a further pass takes over from the one before it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.graph import front_end
from bgd_plugin.kernels import switch
from bgd_plugin.nn import PQWeight
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.quantization import one_pass
from bgd_plugin.quantization.one_pass import Task, _begin_alike
from bgd_plugin.support.log import Log
from tests.networks import FunctionalNet, PlainNet, images, randomized, vectors


class _Reader(nn.Module):
    """A table of rows, and two layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(300, 16), nn.Linear(16, 64), nn.Linear(64, 40)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.words(words).mean(1))))
        return logits


def _survey() -> Survey:
    model = _Reader().eval()
    return surveyed(front_end(model), bgd.BGDConfig(embedding=bgd.LayerConfig()), original=model)


def _with(survey: Survey, name: str, codebook_size: int) -> Survey:
    chosen = tuple(
        (found, dataclasses.replace(planned, codebook_size=codebook_size) if planned.name == name else planned)
        for found, planned in survey.chosen
    )
    return dataclasses.replace(survey, chosen=chosen)


def test_fits_are_kept_where_only_layers_behind_the_table_change() -> None:
    survey = _survey()
    assert _begin_alike(survey, survey)
    assert _begin_alike(survey, _with(survey, "mix", 16))


def test_fits_are_forgotten_where_a_table_or_a_float_weight_is_stored_otherwise() -> None:
    """They made good what the table lost."""
    survey = _survey()
    assert not _begin_alike(survey, _with(survey, "words", 16))
    rest = tuple(pair for pair in survey.chosen if pair[0].name != "words")
    narrow = survey.budgeted(rest, {}, (), None, {"words.weight": "int8"})
    assert not _begin_alike(survey, narrow) and _begin_alike(narrow, narrow)
    half = survey.budgeted(rest, {}, (), None, {})
    assert not _begin_alike(narrow, half)


# --- the steps of a pass


def _task(kind: type[Task] = Task, **fields: Any) -> Any:
    parts: dict[str, Any] = dict.fromkeys(
        ("model", "calibration", "config", "teacher", "forward", "checkpoint", "progress", "batches", "ready", "learnt")
    )
    return kind(**(parts | fields))


def _watch(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> list[tuple[Any, ...]]:
    """Functions of the module that only note what they are called with, and answer so."""
    calls: list[tuple[Any, ...]] = []
    for name, answer in answers.items():

        def noted(*arguments: Any, name: str = name, answer: Any = answer, **settings: Any) -> Any:
            calls.append((name, *arguments, *settings.items()))
            return answer

        monkeypatch.setattr(one_pass, name, noted)
    return calls


def test_sizes_are_chosen_by_what_the_pass_before_has_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _watch(monkeypatch, energy_left=0.7, realized_energy=0.3, energy_at=0.4, choose_sizes="survey")

    @contextlib.contextmanager
    def prepared() -> Iterator[None]:
        calls.append(("begin",))
        yield
        calls.append(("end",))

    measurements = SimpleNamespace(prepared=prepared, scale=SimpleNamespace(tolerance=2.0))
    task = _task(measurements=measurements, config=bgd.BGDConfig(max_divergence=0.02))
    before = SimpleNamespace(survey="before", report=SimpleNamespace(answers=SimpleNamespace(divergence=0.05)))
    assert task._chosen("budget", None) == task._chosen("budget", before) == "survey"
    assert calls == [
        ("begin",),
        ("energy_left", "budget"),
        ("choose_sizes", "budget", measurements, 0.7),
        ("end",),
        ("begin",),
        ("realized_energy", measurements, "before", 0.7, 0.05),
        ("energy_at", [(0.05, 0.3)], pytest.approx(one_pass.AIM * 0.04)),
        ("choose_sizes", "budget", measurements, 0.4),
        ("end",),
    ]


@pytest.mark.parametrize(
    ("divergence", "steepness", "leaves_room"),
    [(0.005, 2.0, True), (0.005, 20.0, False), (0.0079, 2.0, False), (0.011, 20.0, True)],
)
def test_sizes_are_tried_again_only_where_their_curve_leaves_room(
    divergence: float, steepness: float, leaves_room: bool
) -> None:
    """Of a file of 1,000 bytes and a bound of 0.01, at a loss that falls with a power of the bytes."""
    curve = [
        SimpleNamespace(file_bytes=size, expected_divergence=size**-steepness) for size in (500, 700, 900, 1100, 2000)
    ]
    curve.append(SimpleNamespace(file_bytes=4000, expected_divergence=0.0))
    survey = SimpleNamespace(chosen="chosen", storages="storages", curve=curve)
    sketch = SimpleNamespace(file_size=lambda *given: {("chosen", "storages"): 1000}[given])
    task = _task(ready=SimpleNamespace(budget=SimpleNamespace(sketch=sketch)))
    answers = SimpleNamespace(divergence=divergence)
    before = SimpleNamespace(survey=survey, limit=0.01, report=SimpleNamespace(answers=answers))
    assert task._leaves_room(before) is leaves_room
    survey.curve = curve[-1:]
    assert task._leaves_room(before)


@pytest.mark.parametrize("has_budget", [True, False])
def test_samples_are_kept_aside_before_the_others_are_measured(
    has_budget: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _watch(monkeypatch, take_aside_="aside", measured="measurements")
    ready = SimpleNamespace(budget="budget" if has_budget else None)
    task = _task(ready=ready, batches="batches", progress="shown", config=bgd.BGDConfig(kept_aside=0.3))
    task._measure()
    assert task.aside == "aside" and calls[0] == ("take_aside_", "batches", 0.3)
    assert task.measurements == ("measurements" if has_budget else None)
    assert calls[1:] == [("measured", "budget", "batches", "aside", ("progress", "shown"))] * has_budget
    assert ("budget" in task.log.seconds) == has_budget


@pytest.mark.parametrize("is_first", [True, False])
def test_each_pass_has_its_folder_in_the_first_process(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(one_pass, "is_first", lambda: is_first)
    monkeypatch.setattr(one_pass.Run, "open", lambda *arguments: opened.append(arguments))
    parts = {"model": "model", "config": "config", "batches": "batches", "teacher": "teacher", "fits": "fits"}
    task = _task(checkpoint=Path("run"), **parts)
    task._progress(0)
    task._progress(2)
    folders = [Path("run"), Path("run/pass-3")] if is_first else [None, None]
    assert opened == [(folder, "model", "config", "batches", "teacher", "fits") for folder in folders]


@pytest.mark.parametrize(("tolerance", "expected"), [(None, 0.02), (5.0, 0.1)])
def test_the_bound_is_in_the_measure_of_the_outputs(tolerance: float | None, expected: float) -> None:
    measurements = None if tolerance is None else SimpleNamespace(scale=SimpleNamespace(tolerance=tolerance))
    config = bgd.BGDConfig(max_divergence=0.02)
    assert _task(config=config, measurements=measurements)._limit == pytest.approx(expected)
    assert _task(config=dataclasses.replace(config, max_divergence=None), measurements=measurements)._limit == math.inf


class _Watched(Task):
    """Its steps only note that they are run."""

    def _measure(self) -> None:
        self.said.append("measured")  # type: ignore[attr-defined]
        self.log.seconds["budget"] = 1000.0

    def _progress(self, number: int) -> Any:
        forget = lambda: self.said.append("forgotten")  # type: ignore[attr-defined]  # noqa: E731
        return SimpleNamespace(fits=f"fits {number}", forget_fits=forget)

    def _chosen(self, budget: Any, before: Any) -> Any:
        assert budget == "budget"
        self.said.append(("chosen", before))  # type: ignore[attr-defined]
        return SimpleNamespace(notes=("chosen sizes",))

    def _fitted(self, survey: Any, run: Any, log: Log) -> Any:
        self.said.append(("fitted", self.fits))  # type: ignore[attr-defined]
        return SimpleNamespace(survey=survey, log=log)


@pytest.mark.parametrize("is_alike", [True, False])
def test_data_is_measured_once_and_fits_go_to_the_next_pass(is_alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "_begin_alike", lambda one, other: is_alike)
    monkeypatch.setattr(one_pass, "_same_sizes", lambda one, other: False)
    survey = SimpleNamespace(notes=("as it is",))
    task = _task(_Watched, ready=SimpleNamespace(survey=survey, budget="budget"), fits="none yet")
    task._is_worth = lambda before, survey: True
    task._leaves_room = lambda before: True
    task.said = []
    first = task.run(0, None)
    second = task.run(1, first)
    forgotten = [] if is_alike else ["forgotten"]
    assert task.said == [
        "measured",
        ("chosen", None),
        ("fitted", "none yet"),
        ("chosen", first),
        *forgotten,
        ("fitted", "fits 0"),
    ]
    assert task.fits == "fits 1"
    for result in (first, second):  # what is done once counts in each report
        assert result.log.notes == ["chosen sizes"] and result.log.seconds["budget"] >= 1000
    fixed = _task(_Watched, ready=SimpleNamespace(survey=survey, budget=None))
    fixed.said = []
    assert fixed.run(0, None).survey is survey and fixed.said == ["measured", ("fitted", {})]


@pytest.mark.parametrize(
    ("divergence", "expected_bytes", "is_worth"),
    [(0.02, 960, True), (0.02, 2000, True), (0.01, 960, False), (0.01, 940, True), (None, 1000, True)],
)
def test_a_further_pass_is_for_the_bound_or_for_a_smaller_file(
    divergence: float | None, expected_bytes: int, is_worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "_begin_alike", lambda one, other: True)
    monkeypatch.setattr(one_pass, "_same_sizes", lambda one, other: False)
    survey = SimpleNamespace(notes=(), chosen="next", storages={})
    sizes = {"next": expected_bytes, "before": 1000}
    budget = SimpleNamespace(sketch=SimpleNamespace(file_size=lambda chosen, storages: sizes[chosen]))
    task = _task(_Watched, ready=SimpleNamespace(survey=survey, budget=budget), fits="none yet")
    task.said = []
    task._chosen = lambda budget, before: survey
    task._fitted = lambda survey, run, log: "a pass"
    answers = None if divergence is None else SimpleNamespace(divergence=divergence)
    before = SimpleNamespace(
        report=SimpleNamespace(answers=answers),
        limit=0.01,
        survey=SimpleNamespace(chosen="before", storages={}, curve=()),
    )
    assert task.run(1, before) == ("a pass" if is_worth else None)
    task._leaves_room = lambda before: False
    task._chosen = None  # not asked for
    assert task.run(1, before) is None


@pytest.mark.parametrize("divergence", [0.02, 0.005])
@pytest.mark.parametrize("is_same", [True, False])
def test_sizes_that_missed_the_bound_are_not_fitted_again(
    divergence: float, is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are chosen once more, as if the same fit had been made and had missed again."""
    survey = _survey()
    others = [survey if is_same else _with(survey, "mix", 16), _with(survey, "mix", 32)]
    choices = list(others)
    task = _task(ready=SimpleNamespace(budget="budget", survey=survey))
    monkeypatch.setattr(Task, "_chosen", lambda self, budget, before: choices.pop(0))
    monkeypatch.setattr(Task, "_is_worth", lambda self, before, survey: True)
    monkeypatch.setattr(Task, "_progress", lambda self, number: SimpleNamespace(fits={}, forget_fits=lambda: None))
    monkeypatch.setattr(Task, "_fitted", lambda self, survey, run, log: survey)
    report = SimpleNamespace(answers=SimpleNamespace(divergence=divergence))
    before: Any = SimpleNamespace(survey=survey, report=report, limit=0.01)
    fitted = task.run(1, before)
    assert fitted is (others[1] if is_same and divergence > 0.01 else others[0])


def test_weights_that_functions_read_are_layers_of_the_run() -> None:
    """And parameters of the caller's network again afterwards."""
    model = randomized(FunctionalNet())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    data = images(3)
    result = bgd.quantize(model, data, bgd.BGDConfig(max_divergence=None, rounds=1), progress=False)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    functional = [module for module in result.model.modules() if isinstance(module, PQWeight)]
    assert functional
    with torch.no_grad():
        exact, found = (torch.cat([net(x) for x in data]) for net in (model, result.model))
    assert float((found - exact).norm() / exact.norm()) < 0.5


@pytest.mark.parametrize("bound", [0.1, None])
def test_answers_are_judged_in_the_measure_that_chose_the_sizes(
    bound: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it works, layers run plainly."""
    given: list[Any] = []
    real = one_pass.judged

    def judged(job: Any, measure: Any) -> Any:
        given.append((measure, switch._is_plain.get()))
        return real(job, measure)

    monkeypatch.setattr(one_pass, "judged", judged)
    model = randomized(PlainNet())
    bgd.quantize(model, vectors(5), bgd.BGDConfig(max_divergence=bound, rounds=1), progress=False)
    assert given and all((measure is None) == (bound is None) and is_plain for measure, is_plain in given)
    assert not switch._is_plain.get()
