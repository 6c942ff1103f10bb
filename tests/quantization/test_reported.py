"""The bytes and notes of a pass: what is counted, what is done to keep to a budget, and what the report has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bgd_plugin.files.content import measured_size
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.graph import copy_module, front_end
from bgd_plugin.nn import quantized
from bgd_plugin.planning.sizes import paper_bytes
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.planning.types import PlannedLayer, SkippedLayer
from bgd_plugin.quantization import reported as module
from bgd_plugin.quantization.reported import Sizes, reported, sized
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.support.log import Log
from tests.networks import PlainNet, em


def _fitted(**fields: Any) -> tuple[Any, Any]:
    """A job with its second layer quantized, and its front."""
    torch.manual_seed(0)
    model = PlainNet().eval()
    front = front_end(model)
    survey = surveyed(front, em(**fields), original=model)
    student: Any = copy_module(front.network, share_tensors=True)
    codes = torch.randint(0, 16, (32, 8))
    student.set_submodule("2", quantized(copy_module(student.get_submodule("2")), torch.randn(16, 4), codes))
    return SimpleNamespace(student=student, survey=survey, config=survey.config, log=Log()), front


def test_sizes_are_those_of_the_rounded_network_of_its_own_class() -> None:
    job, front = _fitted(codebook_storage="int8", float_storage="float16")
    before = dict(front.own.named_modules())
    sizes = sized(job, front)
    student = job.student
    assert sizes.compressed_bytes == measured_size(student)
    assert sizes.paper_bytes == paper_bytes(student) and sizes.memory_bytes == state_bytes(student.state_dict())
    assert len(student.get_submodule("2").codebook.unique()) <= 64
    bias = student.get_parameter("0.bias")
    assert torch.equal(bias, bias.half().float())
    assert dict(front.own.named_modules()) == before and not job.log.notes


def test_every_process_gets_the_same_rounded_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def synchronized(student: Any) -> None:
        bias = student.get_parameter("0.bias")
        seen.append(student is job.student and torch.equal(bias, bias.half().float()))

    monkeypatch.setattr(module, "synchronize_", synchronized)
    job, front = _fitted(float_storage="float16")
    sized(job, front)
    assert seen == [True]


@pytest.mark.parametrize(("helps", "excess"), [("tiny", 1), ("shorter", 1), ("none", 0), ("none", -1)])
def test_a_file_beyond_the_budget_is_made_shorter(helps: str, excess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job, front = _fitted()
    lengths = iter([1000 + excess, 1000 if helps == "tiny" else 1001, 999])
    shortened: list[Any] = []
    job.config = SimpleNamespace(budget_bytes=lambda original: 1000 if original == job.survey.original_bytes else None)
    monkeypatch.setattr(module, "measured_size", lambda network: next(lengths))
    monkeypatch.setattr(module, "_round_tiny_values_", lambda network: ["0.bias", "2.bias"])
    monkeypatch.setattr(module, "shorten_", lambda *arguments: shortened.append(arguments) or ["2"])
    monkeypatch.setattr(module, "round_to_storage_", lambda *_: None)
    monkeypatch.setattr(module, "transplanted_into", lambda own, student, survey: student)
    sizes = sized(job, front)
    tiny = "budget: tiny values rounded to half precision to stay within it: 0.bias, 2.bias"
    shorter = "budget: codes fitted again, to fewer bytes, to stay within it: 2"
    assert job.log.notes == {"tiny": [tiny], "shorter": [tiny, shorter], "none": []}[helps]
    assert sizes.compressed_bytes == {"tiny": 1000, "shorter": 999, "none": 1000 + excess}[helps]
    assert shortened == ([(job.survey, job.student, 1000)] if helps == "shorter" else [])


def test_tiny_values_are_those_that_half_precision_would_not_hold() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 1))
    tiny = torch.tensor([1e-7, -3.3e-6, 0.0])
    network[0].bias.data.copy_(tiny)
    network[0].weight.data.fill_(3.3e-6)  # no vector
    network[1].running_mean.copy_(torch.tensor([1e-7, 0.5, 0.0]))  # not all of it
    network[2].bias.data.zero_()
    network[3].bias.data.fill_(2.0**-20)  # held as it is
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert module._round_tiny_values_(network) == ["0.bias"]
    assert torch.equal(network[0].bias, tiny.half().float())
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items() if n != "0.bias")


def _layer_report() -> LayerReport:
    names: dict[str, Any] = dict.fromkeys(("name", "target", "kind", "family"), "2")
    planned = PlannedLayer(**names, weight_shape=(32, 32), block_size=4, codebook_size=16, calls=())
    return LayerReport.of(planned, relative_error=0.1)


@pytest.mark.parametrize(("spilled", "peak"), [(0, 10), (2**20, 2**20), (2**20, 3 * 2**20)])
def test_a_report_has_what_every_step_has_found(spilled: int, peak: int) -> None:
    job, _ = _fitted()
    job.batches = SimpleNamespace(store=SimpleNamespace(spilled_bytes=spilled, peak_bytes=peak, bound_bytes=2 * 2**20))
    job.log.note("first")
    job.log.add_seconds("fit", 2.0)
    done, left = _layer_report(), SkippedLayer(name="4", reason="no calibration input reaches it")
    sizes: Any = Sizes(compressed_bytes=10, paper_bytes=11, memory_bytes=12)
    report = reported(job, [done, left], sizes, "answers")  # type: ignore[arg-type]
    assert report.layers == (done,) and report.skipped == (*job.survey.skipped, left)
    assert (report.compressed_bytes, report.paper_bytes, report.memory_bytes) == (10, 11, 12)
    assert report.original_bytes == job.survey.original_bytes and report.answers == "answers"  # type: ignore[comparison-overlap]
    assert report.expected_divergence == job.survey.expected_divergence and report.curve == job.survey.curve
    assert report.seconds == {"fit": 2.0} and report.notes[0] == "first"
    said = f"calibration values: at most {peak // 2**20}.000 MiB of 2.000 MiB in memory, 1.000 MiB in a file"
    more = "; a batch needs more than half of memory_bytes: give smaller batches" if peak > 2 * 2**20 else ""
    assert report.notes[1:] == ((said + more,) if spilled else ())
