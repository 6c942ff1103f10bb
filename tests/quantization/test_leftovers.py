"""Weights that stay float, at the node that reads them: found, turned into small integers, and marked."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin.encoding.small_integers import fold_to_integers
from bgd_plugin.planning.lean import WEIGHT_BITS
from bgd_plugin.pq.integers import integers_with_feedback
from bgd_plugin.quantization import leftovers
from bgd_plugin.quantization.leftovers import leftover_nodes, treat_leftover
from tests.networks import randomized

CONFIG = bgd.BGDConfig(max_divergence=None, kept_aside=0.0)


class _Reads(nn.Module):
    """A weight that a module reads, one that a function reads, and one that two functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.kernel, self.twice = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.conv(x), self.kernel)
        weight = self.twice
        return functional.conv2d(functional.conv2d(x, weight), weight)


def test_each_weight_is_met_where_it_is_read_for_one_call() -> None:
    graph = fx.symbolic_trace(_Reads())
    names = ("conv.weight", "kernel", "twice")
    job: Any = SimpleNamespace(student=graph, survey=SimpleNamespace(leftovers=names))
    found = {node: (name, call.op, call.name) for node, (name, call) in leftover_nodes(job).items()}
    assert found == {
        "conv": ("conv.weight", "call_module", "conv"),
        "kernel": ("kernel", "call_function", "conv2d"),
    }
    job.survey.leftovers = ()
    assert leftover_nodes(job) == {}


def _depthwise() -> tuple[fx.GraphModule, fx.Node]:
    torch.manual_seed(0)
    graph = fx.symbolic_trace(randomized(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6))))
    return graph, next(node for node in graph.graph.nodes if node.target == "0")


@pytest.mark.parametrize("is_refitted", [True, False])
def test_small_integers_leave_their_scale_to_the_norm(is_refitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student, call = _depthwise()
    exact, reference = copy.deepcopy(student), student.get_parameter("0.weight")
    inputs = torch.randn(6, 20, 9, dtype=torch.float64) + 1  # that depend on each other
    gram = inputs.mT @ inputs
    new = reference.detach() * 1.5
    fit = SimpleNamespace(weight=new, gain="gain", gram=gram)
    monkeypatch.setattr(leftovers, "LayerInputs", lambda *_: None)
    monkeypatch.setattr(leftovers, "refitted", lambda *_: fit)
    marked: list[str] = []
    walk: Any = SimpleNamespace(differs_at=lambda node: is_refitted, mark_changed=marked.append)
    config = dataclasses.replace(CONFIG, weight_storage="int5")
    survey = SimpleNamespace(storages={"0.weight": "int5"})
    job: Any = SimpleNamespace(student=student, config=config, survey=survey, generator=lambda name: None)
    assert treat_leftover(job, walk, "0.weight", call, "1") == ("gain" if is_refitted else None)
    start = new if is_refitted else reference.detach()
    wanted, _ = (
        integers_with_feedback(start, WEIGHT_BITS, gram) if is_refitted else fold_to_integers(start, WEIGHT_BITS)
    )
    weight = student.get_parameter("0.weight")
    assert torch.equal(weight, wanted) and not weight.requires_grad and weight is not reference
    assert len(weight.unique()) <= 2**WEIGHT_BITS and marked == ["0"]
    exact.get_submodule("0")._parameters["weight"] = nn.Parameter(start)
    x = torch.randn(5, 6, 7, 7)
    with torch.no_grad():
        assert float((student(x) - exact(x)).norm() / exact(x).norm()) < 0.1


def test_a_refit_knows_its_inputs_and_draws_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    student, call = _depthwise()
    asked: list[Any] = []
    monkeypatch.setattr(leftovers, "LayerInputs", lambda *arguments: arguments)

    def refitted(weight: Tensor, inputs: Any, generator: Any) -> Any:
        asked.append((weight is student.get_parameter("0.weight"), inputs[1:], generator))
        return SimpleNamespace(weight=weight.detach() + 1, gain="gain", gram=None)

    monkeypatch.setattr(leftovers, "refitted", refitted)
    reference = student.get_parameter("0.weight")
    walk: Any = SimpleNamespace(differs_at=lambda node: node.op == "placeholder", mark_changed=lambda name: None)
    config = dataclasses.replace(CONFIG, weight_storage="float32")
    survey = SimpleNamespace(storages={"0.weight": "float32"})
    job: Any = SimpleNamespace(student=student, config=config, survey=survey, generator=lambda name: name)
    treat_leftover(job, walk, "0.weight", call)
    assert asked == [(True, ("0", ["_0"]), "0 refit")]
    assert torch.equal(student.get_parameter("0.weight"), reference + 1)  # a new one: others may hold the old one


def test_a_weight_that_a_function_reads_is_marked_by_its_own_name() -> None:
    graph = fx.symbolic_trace(_Reads())
    call = next(node for node in graph.graph.nodes if node.name == "conv2d")
    marked: list[str] = []
    walk: Any = SimpleNamespace(differs_at=lambda node: False, mark_changed=marked.append)
    survey = SimpleNamespace(storages={"kernel": "float16"})
    job: Any = SimpleNamespace(student=graph, config=CONFIG, survey=survey)
    treat_leftover(job, walk, "kernel", call)
    assert marked == ["kernel"] and torch.equal(graph.kernel, graph.kernel.half().float())  # type: ignore[operator, union-attr, arg-type]
