"""One call looks for layers once, copies the weights once, and computes what a file holds once to tell its length.

Two more copies share the weights: the network that the layers are fitted in, and the float one beside it. Checks of
the trace, its tracing, the sizes and the answers need none: they run a network as it is, and put it back.
`save` writes what was computed then, unless the network has changed (`tests/files/test_content.py`).
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import fx, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig
from bgd_plugin.files import format as file_format
from bgd_plugin.graph import find as graph_find
from bgd_plugin.quantization import quality
from tests.networks import SmallResNet, images, randomized


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
    monkeypatch.setattr(graph_find, "_find_in_graph", counting("find", graph_find._find_in_graph))
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
    assert (counted["find"], counted["copy"], counted["shared copy"], counted["content"]) == (1, 1, 2, 1)


def test_a_budget_takes_no_further_look(counted: Counter[str]) -> None:
    """But a third copy: in it all layers have the errors that are expected of them, beside the float network."""
    bgd.quantize(randomized(SmallResNet()), images(size=12), BGDConfig(target_ratio=4, rounds=1), progress=False)
    assert (counted["find"], counted["copy"], counted["shared copy"]) == (1, 1, 3)


def test_each_further_pass_for_a_bound_prepares_the_network_anew(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers have been replaced by then."""
    monkeypatch.setattr(quality, "_correction", lambda report, bound, is_first: 2.0 if is_first else None)
    bgd.quantize(randomized(SmallResNet()), images(size=12), BGDConfig(rounds=1), progress=False)
    assert (counted["find"], counted["copy"], counted["shared copy"]) == (2, 2, 6)


def test_a_graph_is_fitted_as_it_is(counted: Counter[str]) -> None:
    graph = fx.symbolic_trace(randomized(SmallResNet()))
    bgd.quantize(graph, images(size=12), CONFIGS["em"], progress=False)
    assert (counted["find"], counted["copy"], counted["shared copy"]) == (1, 1, 1)


def test_plan_looks_once_and_copies_no_weight(counted: Counter[str]) -> None:
    bgd.plan(randomized(SmallResNet()))
    assert (counted["find"], counted["copy"], counted["shared copy"], counted["content"]) == (1, 0, 2, 1)
