"""What a run depends on, and how two runs differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bgd_plugin import BGDConfig, DistillationConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.quantization.fingerprint import described, differing

X = torch.ones(2, 4)


def _described(**parts: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    batches = [Batch((X,)), Batch((X,), {"mask": X})]
    given: dict[str, Any] = {"model": net, "config": BGDConfig(), "batches": batches, "teacher": net} | parts
    return described(given["model"], given["config"], given["batches"], given["teacher"])


def _differing(**parts: Any) -> list[str]:
    return list(differing(_described(), _described(**parts)))


def test_the_same_run_does_not_differ() -> None:
    assert _differing() == []


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([Batch((X + 1,)), Batch((X,), {"mask": X})], "batch 0"),
        ([Batch((X,)), Batch((X,), {"mask": X + 1})], "batch 1"),
        ([Batch((X,)), Batch((X,), {"mask": X}), Batch((X,))], "batch 2"),
        ([Batch((X,))], "batch 1"),
        ([], "batch 0, batch 1"),
        ([Batch((X + n,)) for n in range(1, 6)], "batch 0, batch 1, batch 2 and 2 more"),
    ],
)
def test_batches_that_differ_are_named(batches: Any, said: str) -> None:
    assert _differing(batches=batches) == [f"calibration ({said})"]


def test_settings_that_differ_are_named_with_both_values() -> None:
    (said,) = _differing(config=BGDConfig(seed=1))
    assert said == "config (seed was 0, is 1)"
    (said,) = _differing(config=BGDConfig(distillation=DistillationConfig(steps=7)))
    assert "distillation.steps was not there, is 7" in said or said.startswith("config (distillation was null, is not")


def test_a_network_and_its_teacher_are_told_apart() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert [said.partition(" ")[0] for said in _differing(teacher=net)] == ["teacher"]
    assert [said.partition(" ")[0] for said in _differing(model=net)] == ["network"]
    assert "class" in _differing(teacher=nn.Linear(4, 4))[0]


def test_statistics_are_part_of_the_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[1].running_var.add_(1)  # type: ignore[operator,union-attr]
    assert _differing(model=net, teacher=net) == ["network (1.running_var)", "teacher (1.running_var)"]


def test_what_is_missing_or_damaged_differs() -> None:
    wanted = _described()
    assert len(list(differing({}, wanted))) == len(wanted)
    assert any(
        said.startswith("version (torch was not there")
        for said in differing(wanted | {"version": {"bgd-plugin": wanted["version"]["bgd-plugin"]}}, wanted)
    )
    assert next(iter(differing(wanted | {"config": 3}, wanted))).startswith("config (")
