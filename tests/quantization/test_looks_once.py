"""One call looks for layers once, copies the weights once, and computes what a file holds once to tell its length.

One more copy shares the weights: the network that the layers are fitted in, beside the float one. Checks of the trace,
its tracing, the errors that are tried, the sizes and the answers need none: they run a network as it is, and put it
back.
`save` writes what was computed then, unless the network has changed (`tests/files/test_content.py`).
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig
from bgd_plugin.calibration import collect_batches, rerun
from bgd_plugin.files import format as file_format
from bgd_plugin.graph import finding_layers
from bgd_plugin.quantization import one_pass, prepare, quality
from tests.networks import SmallResNet, images, randomized


class Branching(SmallResNet):
    """Does not trace: it looks at its input's values."""

    def forward(self, x: Tensor) -> Tensor:
        """The same as the other's."""
        return super().forward(x if float(x.sum()) < 1e9 else -x)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the library looks for layers, copies a whole network, and computes a file's content."""
    counts: Counter[str] = Counter()
    deepcopy = copy.deepcopy

    def copied(value: Any, memo: Any = None) -> Any:
        if isinstance(value, nn.Module) and len(list(value.modules())) > 5:
            shares = all(id(parameter) in (memo or {}) for parameter in value.parameters())
            counts["shared copy" if shares else "copy"] += 1
        return deepcopy(value, memo)

    def counting(name: str, function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(copy, "deepcopy", copied)
    monkeypatch.setattr(finding_layers, "_find_in_graph", counting("find", finding_layers._find_in_graph))
    parts: Any = file_format._Parts
    monkeypatch.setattr(parts, "__init__", counting("content", parts.__init__))
    return counts


CONFIGS = {
    "default": BGDConfig(rounds=1, max_divergence=None),
    "em": BGDConfig(method="em", em_iterations=2, batchnorm="keep", max_divergence=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_is_looked_at_once(name: str, counted: Counter[str], tmp_path: Path) -> None:
    result = bgd.quantize(randomized(SmallResNet()), images(size=12), CONFIGS[name], progress=False)
    bgd.save(result.model, tmp_path / "net")
    assert (counted["find"], counted["copy"], counted["shared copy"], counted["content"]) == (1, 1, 1, 1)


def test_a_budget_takes_no_further_look(counted: Counter[str]) -> None:
    bgd.quantize(randomized(SmallResNet()), images(size=12), BGDConfig(target_ratio=4, rounds=1), progress=False)
    assert (counted["find"], counted["copy"], counted["shared copy"]) == (1, 1, 1)


@pytest.mark.parametrize("network", [SmallResNet, Branching])
def test_each_further_pass_for_a_bound_takes_one_more_copy(
    network: type[nn.Module], counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was prepared for the first one: trace, rehearsal, survey and measurements."""
    monkeypatch.setattr(quality, "_is_good_enough", lambda report, limit, is_first: False)
    monkeypatch.setattr(quality, "_same_sizes", lambda one, other: False)
    monkeypatch.setattr(one_pass, "_SMALLER", 2.0)
    rehearsed = Counter[str]()
    function = prepare.rehearsed
    monkeypatch.setattr(prepare, "rehearsed", lambda *given: (rehearsed.update(["it"]), function(*given))[1])
    result = bgd.quantize(randomized(network()), images(size=12), BGDConfig(rounds=1), progress=False)
    assert "after 3 passes" in result.report.notes[-1]
    assert (counted["copy"], counted["shared copy"], rehearsed["it"]) == (1, 3, 1)
    assert counted["find"] == (0 if network is Branching else 1)  # which is looked at without a graph


def test_a_further_pass_over_the_same_layers_knows_the_runs_of_a_network_without_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "_is_good_enough", lambda report, limit, is_first: False)
    monkeypatch.setattr(quality, "_same_sizes", lambda one, other: False)
    monkeypatch.setattr(one_pass, "_SMALLER", 2.0)
    made, passes = Counter[str](), []  # how often the network was recorded in a pass, and the names of its layers
    recorded, fitted = rerun.recorded, one_pass.Task._fitted
    monkeypatch.setattr(rerun, "recorded", lambda *given: (made.update(["run"]), recorded(*given))[1])

    def counting(task: one_pass.Task, *given: Any) -> Any:
        before = made["run"]
        result = fitted(task, *given)
        passes.append((made["run"] - before, {found.name for found in result.survey.found}))
        return result

    monkeypatch.setattr(one_pass.Task, "_fitted", counting)
    bgd.quantize(randomized(Branching()), images(size=12), BGDConfig(rounds=1), progress=False)
    assert len(passes) == 3 and passes[0][0] > 0
    for number, (runs, names) in enumerate(passes):
        assert (runs == 0) == any(names == other for _, other in passes[:number])
    assert any(runs == 0 for runs, _ in passes)


@torch.no_grad()
def test_a_walk_with_the_records_of_another_gives_the_same_inputs() -> None:
    network = randomized(Branching()).eval()
    weights = {name: m.weight for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    norms = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    walks: list[rerun.Rerun] = []
    for _ in range(2):
        batches = collect_batches(images(size=12), network, device=torch.device("cpu"), forward=None)
        records = walks[0].records if walks else None
        walks.append(rerun.Rerun(network, network, batches, weights, norms, records=records))
    first, second = walks
    assert first.order == second.order and first.records is second.records
    for name in first.order:
        if name in weights:
            for one, other in zip(first.inputs(name), second.inputs(name), strict=True):
                assert torch.equal(one[0], other[0]) and one[1] == other[1]


def test_a_graph_is_fitted_as_it_is(counted: Counter[str]) -> None:
    graph = fx.symbolic_trace(randomized(SmallResNet()))
    bgd.quantize(graph, images(size=12), CONFIGS["em"], progress=False)
    assert (counted["find"], counted["copy"], counted["shared copy"]) == (1, 1, 1)


def test_a_network_that_does_not_trace_is_copied_no_more_often(counted: Counter[str]) -> None:
    bgd.quantize(randomized(Branching()), images(size=12), CONFIGS["em"], progress=False)
    assert (counted["copy"], counted["shared copy"]) == (1, 1)


def test_plan_looks_once_and_copies_no_weight(counted: Counter[str]) -> None:
    bgd.plan(randomized(SmallResNet()))
    assert (counted["find"], counted["copy"], counted["shared copy"], counted["content"]) == (1, 0, 1, 1)
