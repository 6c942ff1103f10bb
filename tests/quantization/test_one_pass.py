"""What the passes of one call share, and what each step of a pass is told."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.outputs import LOGITS, Scale
from bgd_plugin.quantization import layer as layer_step
from bgd_plugin.quantization import one_pass
from bgd_plugin.quantization.one_pass import Task
from bgd_plugin.quantization.prepare import prepared
from tests.networks import PlainNet, em, vectors


class _Branching(nn.Module):
    """A norm behind a layer, and a branch that no trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32)), nn.Linear(32, 24)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.part(x))
        return self.last(x) if float(x.abs().max()) > 0 else x


def _task(model: nn.Module | None = None, **fields: Any) -> Task:
    torch.manual_seed(0)
    model = PlainNet().eval() if model is None else model
    config = fields.pop("config", em())
    data = vectors()
    parts: dict[str, Any] = {
        "model": model,
        "calibration": data,
        "config": config,
        "teacher": None,
        "forward": None,
        "checkpoint": None,
        "progress": False,
        "batches": collect_batches(data, model, device=torch.device("cpu"), forward=None),
        "ready": prepared(model, config, None),
        "learnt": {"2": False},
    }
    return Task(**(parts | fields))


def test_a_pass_gives_the_report_and_the_network_of_its_class() -> None:
    task = _task(PlainNet().train())
    task.log.add_seconds("before", 7.0)
    result = task.run(0, None)
    assert (
        [layer.name for layer in result.report.layers] == [layer.name for layer in result.survey.layers] == ["2", "4"]
    )
    assert result.report.seconds["before"] >= 7.0 and "fit" in result.report.seconds
    network = result.network()
    assert type(network) is PlainNet and isinstance(network[2], PQModule)
    assert network.training and not network[2].codebook.requires_grad and network[0].weight.requires_grad


def test_layers_of_the_same_sizes_are_not_fitted_in_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []
    real = layer_step._fit
    monkeypatch.setattr(layer_step, "_fit", lambda job, found, *a: fitted.append(found.name) or real(job, found, *a))
    task = _task()
    first = task.run(0, None)
    second = task.run(1, first)
    assert fitted == ["2", "4"]
    assert [x.relative_error for x in first.report.layers] == [x.relative_error for x in second.report.layers]


@pytest.mark.parametrize(("number", "folder"), [(0, "run"), (1, "run/pass-2"), (2, "run/pass-3")])
@pytest.mark.parametrize("is_first", [True, False])
def test_each_pass_has_a_folder_in_the_first_process(
    number: int, folder: str, is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(one_pass, "is_first", lambda: is_first)
    monkeypatch.setattr(one_pass.Run, "open", lambda *arguments: opened.append(arguments))
    task = _task(checkpoint=tmp_path / "run", fits={"a": "fit"}, teacher=nn.Identity())
    task._progress(number)
    ((place, *others),) = opened
    assert place == (tmp_path / folder if is_first else None)
    assert others == [task.model, task.config, task.batches, task.teacher, task.fits]
    opened.clear()
    _task()._progress(number)
    assert opened[0][0] is None


@pytest.mark.parametrize("progress", [True, False])
def test_bars_are_shown_if_that_is_asked_for(progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []
    bar, measured = one_pass.progress_bar, one_pass.measured

    def watched_bar(survey: Any, batches: int, *, shown: bool) -> Any:
        flags.append(shown)
        assert batches == 3
        return bar(survey, batches, shown=False)

    def watched(budget: Any, batches: Any, aside: Any, *, progress: bool) -> Any:
        flags.append(progress)
        samples.append((sum(b.size for b in batches), sum(b.size for b in aside)))
        return measured(budget, batches, aside, progress=False)

    flags, samples = shown, list[Any]()
    monkeypatch.setattr(one_pass, "progress_bar", watched_bar)
    monkeypatch.setattr(one_pass, "measured", watched)
    config = bgd.BGDConfig(target_ratio=2.5, kept_aside=0.25, rounds=1)
    report = _task(config=config, progress=progress).run(0, None).report
    assert flags == [progress, progress]
    assert samples == [(18, 6)]
    assert report.answers is not None and report.answers.samples == 6 and report.answers.kept_aside
    assert report.seconds["budget"] > 0


def test_without_sizes_to_choose_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(one_pass, "measured")
    task = _task()
    task._measure()
    assert task.measurements is None and task.aside == [] and task._limit == math.inf


@pytest.mark.parametrize(("has_pass", "has_answers"), [(False, False), (True, False), (True, True)])
def test_the_energy_that_is_left_is_learnt_from_the_pass_before(
    has_pass: bool, has_answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(one_pass, "energy_left", lambda budget: 0.25)
    monkeypatch.setattr(one_pass, "realized_energy", lambda *arguments: asked.append(arguments) or 0.125)
    monkeypatch.setattr(one_pass, "choose_sizes", lambda *arguments: arguments)
    measurements: Any = object()
    task = _task(measurements=measurements, energy=0.5)
    answers = SimpleNamespace(divergence=0.75) if has_answers else None
    before: Any = SimpleNamespace(report=SimpleNamespace(answers=answers), survey="survey") if has_pass else None
    energy = 0.125 if has_answers else 0.25
    assert task._chosen("budget", before) == ("budget", measurements, energy)  # type: ignore[arg-type, comparison-overlap]
    assert task.energy == energy
    assert asked == ([(measurements, "survey", 0.5, 0.75)] if has_answers else [])


def test_a_bound_counts_in_the_measure_of_the_outputs() -> None:
    config = bgd.BGDConfig(max_divergence=0.05)
    assert _task(config=config)._limit == 0.05
    for scale, limit in ((LOGITS, 0.05), (Scale(measure="squared difference", tolerance=0.1), 0.005)):
        measurements: Any = SimpleNamespace(scale=scale)
        assert _task(config=config, measurements=measurements)._limit == pytest.approx(limit)


@pytest.mark.parametrize("scale", [None, Scale(measure="squared difference")])
def test_answers_are_judged_by_the_measure_that_chose_the_sizes(
    scale: Scale | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    real = one_pass.judged
    monkeypatch.setattr(one_pass, "judged", lambda job, measure: given.append(measure) or real(job, measure))
    measurements: Any = None if scale is None else SimpleNamespace(scale=scale)
    task = _task(measurements=measurements)
    task.run(1, None)
    assert given == [None if scale is None else "squared difference"]


@pytest.mark.parametrize("is_given", [True, False])
def test_the_teacher_is_the_one_given_or_the_float_network(is_given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bool] = []
    monkeypatch.setattr(one_pass, "teacher_for", lambda model, config, device: (model, device.type))
    other = PlainNet().eval()
    task = _task(teacher=other if is_given else None)
    job = task._job(task.ready.survey, task.ready.front.network, "run", "bar", task.log)  # type: ignore[arg-type]
    assert job.teacher == (other if is_given else task.model, "cpu")  # type: ignore[comparison-overlap]
    monkeypatch.setattr(one_pass, "check_teacher", lambda job, *, is_given: checked.append(is_given))
    monkeypatch.setattr(one_pass, "teacher_for", lambda *_: None)
    task.run(0, None)
    assert checked == [is_given]


def test_the_steps_work_on_a_copy_that_shares_the_weights_and_know_the_norms() -> None:
    task = _task()
    reference = task.ready.front.network
    job = task._job(task.ready.survey, reference, "run", "bar", task.log)  # type: ignore[arg-type]
    assert isinstance(job.student, fx.GraphModule) and job.student is not reference and job.reference is reference
    assert job.student.get_parameter("0.weight") is reference.get_parameter("0.weight")
    assert job.norms == {} and (job.run, job.bar, job.log) == ("run", "bar", task.log)
    assert job.batches is task.batches and job.aside is task.aside
    branching = _task(_Branching().eval())
    job = branching._job(branching.ready.survey, branching.ready.front.network, "run", "bar", task.log)  # type: ignore[arg-type]
    assert job.norms == {"part.0": "part.1"}


def test_training_follows_the_fit_on_the_data_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def watched(job: Any, *data: Any) -> None:
        given.append((isinstance(job.student.get_submodule("2"), PQModule), *data))

    def forward(model: Any, batch: Any) -> Any:
        return model(batch)

    monkeypatch.setattr(one_pass, "train", watched)
    task = _task(forward=forward)
    task.run(0, None)
    assert given == [(True, task.calibration, forward)]


def test_ctrl_c_within_the_fit_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(one_pass, "quantize_layers", stopped)
    with pytest.raises(KeyboardInterrupt) as stop:
        _task(checkpoint=tmp_path / "run").run(0, None)
    assert stop.value.__notes__ == [f"progress is saved in {tmp_path / 'run'}; the same call resumes there"]


@pytest.mark.parametrize("steps", [0, 3])
def test_the_bar_names_each_layer_and_counts_it_and_its_steps(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier call has finished them."""
    said: list[Any] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def set_description(self, text: str) -> None:
            said.append(text)

        def update(self, count: int = 1) -> None:
            said.extend([1] * count)

    monkeypatch.setattr(one_pass, "progress_bar", lambda *_, **__: Bar())
    distillation = bgd.DistillationConfig(steps=steps, batch_size=8) if steps else None
    for _ in range(2):
        _task(config=em(distillation=distillation), checkpoint=tmp_path).run(0, None)
        assert said == ["2", *[1] * (steps + 1), "4", *[1] * (steps + 1)]
        said.clear()


def test_a_layer_out_of_reach_has_the_error_of_its_weight() -> None:
    task = _task(config=bgd.BGDConfig(target_ratio=2.5))
    bar = SimpleNamespace(update=lambda count: None)
    run = one_pass.Run(None)
    job = task._job(task.ready.survey, task.ready.front.network, run, bar, task.log)
    found, planned = job.survey.chosen[0]
    weight = found.matrix.detach().clone()
    report: Any = layer_step.treat_unreached(job, 0)
    decoded = job.student.get_submodule(planned.target).matrix.detach()
    lost = float((weight - decoded).square().sum() / weight.square().sum())
    assert report.relative_error == pytest.approx(lost, rel=1e-4) and 0 < lost < 0.5
    assert report.note.endswith("no calibration input reaches it: fitted to its weight alone, to keep to the budget")
    assert run.fits[planned.name][0] == planned and torch.equal(
        run.fits[planned.name][1].codes, job.student.get_submodule(planned.target).codes
    )
