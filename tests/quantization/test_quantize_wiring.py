"""What `quantize` hands to its steps, argument by argument."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.quantization import quantize as quantize_module
from tests.networks import PlainNet, vectors


@pytest.mark.parametrize("bound", [None, 0.05])
def test_each_argument_reaches_the_step_that_needs_it(
    bound: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def noted(name: str, answer: Any) -> Any:
        def step(*arguments: Any, **fields: Any) -> Any:
            given[name] = (*arguments, *fields.values())
            return answer

        return step

    class Task:
        def __init__(self, **fields: Any) -> None:
            given["task"] = fields

        def once(self) -> Any:
            return self.run(0, None)

        def run(self, number: int, before: Any) -> Any:
            given["run"] = number, before
            return SimpleNamespace(network=lambda: "network", report="report")

    model, data, teacher, config = PlainNet(), vectors(2), PlainNet(), bgd.BGDConfig(max_divergence=bound, seed=3)
    model[2].weight.requires_grad_(False)
    found = [SimpleNamespace(target=name, weight=model.get_parameter(f"{name}.weight")) for name in ("2", "4")]
    ready = SimpleNamespace(survey=SimpleNamespace(found=found))
    forward = lambda model, batch: model(batch)  # noqa: E731
    monkeypatch.setattr(quantize_module, "prepared", noted("prepared", "first"))
    monkeypatch.setattr(quantize_module, "collect_batches", noted("collected", "batches"))
    monkeypatch.setattr(quantize_module, "prepared_for", noted("prepared for", ready))
    monkeypatch.setattr(quantize_module, "check_arguments", noted("checked", None))
    monkeypatch.setattr(
        quantize_module, "within_bound", lambda run: given.update(bounded=True) or run(0, "a pass before")
    )
    monkeypatch.setattr(quantize_module, "Task", Task)
    result = bgd.quantize(
        model,
        data,
        config,
        teacher=nn.DataParallel(teacher),
        forward=forward,
        checkpoint=str(tmp_path),
        memory_bytes=12345,
        progress=False,
        original_bytes=10**7,
    )
    settings = config.decided(has_data=True)
    assert given["checked"] == (model, data, settings, 12345)
    assert given["prepared"] == (model, settings, 10**7)
    assert given["collected"] == (data, model, torch.device("cpu"), forward, 12345)
    assert given["prepared for"] == ("first", model, settings, 10**7, "batches")
    assert given["task"] == {
        "model": model,
        "calibration": data,
        "config": settings,
        "teacher": teacher,
        "forward": forward,
        "checkpoint": tmp_path,
        "progress": False,
        "batches": "batches",
        "ready": ready,
        "learnt": {"2": False, "4": True},
    }
    assert given["run"] == ((0, None) if bound is None else (0, "a pass before"))
    assert given.get("bounded", False) == (bound is not None)
    assert (result.model, result.report) == ("network", "report")
