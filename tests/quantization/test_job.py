"""Which batch norm follows a layer, and random numbers for each purpose."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

from bgd_plugin import BGDConfig
from bgd_plugin.quantization.job import Job


def _job(student: nn.Module, **fields: Any) -> Job:
    parts: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Job)), None)
    return Job(**(parts | {"student": student, "config": BGDConfig(seed=3), "norms": {"a": "norm"}} | fields))


def _found(**fields: Any) -> Any:
    parts = {"kind": "conv2d", "target": "a", "calls": ("_0",), "tied": (), "hidden": False}
    return SimpleNamespace(**(parts | fields))


@pytest.mark.parametrize(
    ("fields", "with_graph", "without"),
    [
        ({}, "1", "norm"),
        ({"kind": "conv_transpose2d"}, None, None),
        ({"kind": "conv_transpose1d"}, None, None),
        ({"tied": ("b",)}, "1", None),
        ({"hidden": True}, None, "norm"),
        ({"target": "z", "calls": ("_2",)}, None, None),
    ],
)
def test_the_norm_behind_a_layer(fields: Any, with_graph: str | None, without: str | None) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    assert _job(fx.symbolic_trace(layers)).batchnorm_after(_found(**fields)) == with_graph
    assert _job(layers).batchnorm_after(_found(**fields)) == without


def test_each_purpose_has_its_random_numbers() -> None:
    job = _job(nn.Identity())
    drawn = [
        torch.rand(3, generator=generator)
        for generator in (
            job.generator("a"),
            job.generator("a"),
            job.generator("b"),
            job.generator("a", "b"),
            _job(nn.Identity(), config=BGDConfig(seed=4)).generator("a"),
        )
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in drawn[2:])
    assert not torch.equal(drawn[2], drawn[3])
