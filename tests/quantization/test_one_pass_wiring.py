"""What the steps of one pass are given, and what the pass comes to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import bgd_plugin as bgd
from bgd_plugin.graph import front_end
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.quantization import one_pass
from bgd_plugin.quantization.one_pass import Task
from bgd_plugin.support.log import Log
from tests.networks import PlainNet, em


class _Normed(PlainNet):
    """A norm behind a layer; with branches it has no graph."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self[3] = nn.BatchNorm1d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if not self.branches or float(x.abs().max()) > 0 else x


@pytest.mark.parametrize("has_teacher", [True, False])
@pytest.mark.parametrize("branches", [True, False])
def test_each_step_is_given_what_those_before_it_made(
    branches: bool, has_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    jobs: list[Any] = []

    def noted(name: str, answer: Any) -> Any:
        def step(job: Any, *arguments: Any, **fields: Any) -> Any:
            jobs.append(job)
            said.append((name, *arguments, *fields.values()))
            return answer

        return step

    for name, answer in (
        ("check_teacher", None),
        ("quantize_layers", "outcomes"),
        ("train", None),
        ("sized", "sizes"),
        ("judged", "answers"),
        ("reported", "report"),
    ):
        monkeypatch.setattr(one_pass, name, noted(name, answer))
    monkeypatch.setattr(one_pass, "batchnorms_in_parts", lambda student: {"2": "3"})
    monkeypatch.setattr(one_pass, "progress_bar", lambda *_, **__: contextlib.nullcontext("bar"))
    monkeypatch.setattr(one_pass, "settled", lambda *arguments: said.append(("settled", *arguments)) or "network")
    monkeypatch.setattr(one_pass, "restore_", lambda *arguments: said.append(("restored", *arguments)))
    model, own_teacher = _Normed(branches).eval(), PlainNet()
    config = em(finetuning=bgd.FinetuningConfig(steps=1))
    front = front_end(model)
    survey = surveyed(front, config, original=model)
    batches: Any = SimpleNamespace(given=3)
    log, aside = Log(), ["aside"]
    run: Any = SimpleNamespace(says_how_to_go_on=lambda: contextlib.nullcontext(said.append("can go on")))
    measurements: Any = SimpleNamespace(scale=SimpleNamespace(measure="measure", tolerance=1.0))
    task = Task(
        model=model,
        calibration="calibration",  # type: ignore[arg-type]
        config=config,
        teacher=own_teacher if has_teacher else None,
        forward="forward",  # type: ignore[arg-type]
        checkpoint=Path("run"),
        progress=False,
        batches=batches,
        ready=SimpleNamespace(front=front),  # type: ignore[arg-type]
        learnt={"2": True},
        aside=aside,  # type: ignore[arg-type]
        measurements=measurements,
    )
    result = task._fitted(survey, run, log)
    assert said == [
        "can go on",
        ("check_teacher", has_teacher),
        ("quantize_layers",),
        ("train", "calibration", "forward"),
        ("sized", front),
        ("judged", "measure"),
        ("reported", "outcomes", "sizes", "answers"),
    ]
    assert (result.report, result.survey) == ("report", survey)  # type: ignore[comparison-overlap]
    (job,) = {id(job): job for job in jobs}.values()
    assert (job.config, job.survey, job.batches, job.aside, job.run, job.bar, job.log) == (
        config,
        survey,
        batches,
        aside,
        run,
        "bar",
        log,
    )
    assert job.student is not job.reference and isinstance(job.student, fx.GraphModule) != branches
    assert job.student.get_parameter("0.weight") is job.reference.get_parameter("0.weight")
    assert job.norms == ({"2": "3"} if branches else {})
    taught = own_teacher if has_teacher else model
    assert job.teacher is not taught and job.teacher.get_parameter("0.weight") is taught[0].weight
    said.clear()
    assert result.network() == "network"  # type: ignore[comparison-overlap]
    assert said == [("settled", front, job.student, survey, batches), ("restored", "network", model, {"2": True})]
