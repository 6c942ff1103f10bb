"""Rewrites: a module takes a float layer's place under every name, and gives it back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.graph import find_layers, isolate_weights_, module_paths, swap_, trace
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
