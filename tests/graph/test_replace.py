"""Rewrites: a module takes a float layer's place under every name, and gives it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.graph import Replaced, find_layers, follow_, isolate_weights_, module_paths, swap_, trace
from bgd_plugin.nn import FloatWeight
from tests.networks import FunctionalNet, TwiceNet, images, same_outputs


def test_a_shared_module_has_all_its_paths() -> None:
    model = TwiceNet()
    assert module_paths(model, model.shared) == ["shared", "alias"]


def test_a_swap_reaches_every_path() -> None:
    model = TwiceNet()
    new = nn.Linear(32, 32)
    swap_(model, "shared", new)
    assert model.shared is new
    assert model.alias is new


def test_isolated_weights_change_no_output() -> None:
    model = FunctionalNet()
    graph_module = trace(FunctionalNet())
    graph_module.load_state_dict(model.state_dict())
    isolate_weights_(graph_module, find_layers(graph_module)[0])
    assert isinstance(graph_module.get_submodule("own.weight"), FloatWeight)
    assert same_outputs(model, graph_module, images(size=12))


def test_an_isolated_weight_stands_right_before_its_first_call() -> None:
    """All get_attr nodes may stand at the graph's head; the fit needs the layer's input to be there by then."""

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w
            x = torch.relu(self.first(x))
            return F.linear(F.linear(x, w), w)

    graph_module = trace(Early())
    isolate_weights_(graph_module, find_layers(graph_module)[0])
    targets = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    order = [str(node.target) if node.op == "call_module" else node.name for node in graph_module.graph.nodes]
    assert targets == ["first", "w"]
    assert order.index("relu") < order.index("w") < order.index("linear")
    assert not [node for node in graph_module.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize("at_once", [False, True])
def test_references_follow_one_by_one_or_all_at_once(at_once: bool) -> None:
    """One that is replaced twice gives way to the last one."""
    network: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network.held = [network[0], {"x": network[1]}]
    first, second, last = (nn.Linear(4, 4) for _ in range(3))
    replaced: Replaced = []
    for target, module in (("0", first), ("1", second), ("0", last)):
        swap_(network, target, module, replaced if at_once else None)
    if at_once:
        assert network.held[0] is not last and network[0] is last
        follow_(network, replaced)
    assert network.held[0] is last and network.held[1]["x"] is second
    follow_(network, [])
