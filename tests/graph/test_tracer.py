"""Tracing: our modules and plain layers are one node each, and a network that does not trace says where and why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from bgd_plugin.errors import TraceError
from bgd_plugin.graph import copy_module, trace
from bgd_plugin.nn import PQLinear, quantized
from tests.networks import ConvOfItsOwn, SmallResNet, randomized, vectors


def _calls(graph_module: fx.GraphModule) -> list[str]:
    return [f"{node.op} {node.target}" for node in graph_module.graph.nodes if node.op.startswith("call_module")]


def test_quantized_modules_are_one_node() -> None:
    layer = quantized(nn.Linear(8, 4), torch.randn(4, 4), torch.zeros(4, 2, dtype=torch.int64))
    assert _calls(trace(nn.Sequential(layer, nn.ReLU()))) == ["call_module 0", "call_module 1"]


def test_a_subclass_that_runs_its_parents_forward_is_one_node() -> None:
    class Named(nn.Linear):
        pass

    assert _calls(trace(nn.Sequential(Named(8, 4)))) == ["call_module 0"]


def test_a_subclass_with_a_forward_of_its_own_is_walked_into() -> None:
    graph = trace(nn.Sequential(ConvOfItsOwn(3, 4, 3))).graph
    assert [str(node.target) for node in graph.nodes if node.op == "get_attr"] == ["0.weight", "0.bias"]


def test_a_graph_module_is_passed_on() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4)))
    assert trace(traced) is traced


def test_the_graph_follows_evaluation_mode_and_the_modes_are_kept() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.extra = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(self.fc(x)) if self.training else self.fc(x)

    model = Dropping()
    model.fc.eval()
    graph_module = trace(model)
    assert _calls(graph_module) == ["call_module fc"]
    assert (model.training, model.fc.training, model.extra.training) == (True, False, True)
    assert (graph_module.training, graph_module.fc.training) == (True, False)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_the_smallest_part_that_does_not_trace_is_named() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Linear(12, 12)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12)), nn.Sequential(nn.ReLU(), _Branching())])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](self.good(x)))

    with pytest.raises(TraceError, match=re.escape("submodule 'blocks.1.1' (_Branching) raises TraceError")):
        trace(Outer())


def test_it_says_what_to_do_about_it() -> None:
    with pytest.raises(TraceError) as info:
        trace(_Branching())
    text = str(info.value)
    assert "_Branching itself raises" in text
    assert "bgd_plugin.quantize on a submodule" in text
    assert "a GraphModule from your own tracer" in text


def test_a_copy_shares_no_module() -> None:
    model = SmallResNet()
    shared = {id(m) for m in model.modules()} & {id(m) for m in copy_module(model, share_tensors=True).modules()}
    assert not shared


@pytest.mark.parametrize("share", [True, False])
def test_a_copy_shares_its_tensors_only_where_asked(share: bool) -> None:
    model = randomized(SmallResNet())
    duplicate = copy_module(model, share_tensors=share)
    assert all((a is b) == share for a, b in zip(model.parameters(), duplicate.parameters(), strict=True))
    # a run may write into buffers, into those of a network that shares its parameters, too
    assert not any(a is b for a, b in zip(model.buffers(), duplicate.buffers(), strict=True))


@pytest.mark.parametrize("share", [True, False])
def test_a_network_under_a_pruning_mask_can_be_copied(share: bool) -> None:
    """`torch.nn.utils.prune` leaves a computed tensor where the weight was, which has no deep copy of its own."""
    model = nn.Sequential(nn.Linear(12, 12))
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = vectors()[0]
    expected = model(x)
    duplicate = copy_module(model, share_tensors=share)
    assert torch.equal(duplicate(x), expected)
    duplicate[0].weight_mask = torch.ones(12, 12)
    assert torch.equal(model(x), expected)
    assert not torch.equal(duplicate(x), expected)


def test_a_network_with_quantized_modules_traces_again() -> None:
    layer = quantized(nn.Linear(8, 4), torch.randn(4, 4), torch.zeros(4, 2, dtype=torch.int64))
    graph_module = trace(trace(nn.Sequential(layer)))
    assert isinstance(graph_module.get_submodule("0"), PQLinear)


def test_a_layer_of_another_quantizer_is_a_leaf_and_other_integers_are_not() -> None:
    class _Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = 8
            self.register_buffer("qweight", torch.ones(4, 8, dtype=torch.int32))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.qweight.float().T + self.bias  # type: ignore[operator]

    class _Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.ones(4, 8, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.positions.float().mean()  # type: ignore[operator]

    graph = trace(nn.Sequential(_Theirs(), _Positions()).eval()).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0"]


class _Remembers(nn.Module):
    """Computes something at its first call and keeps it, as torchvision's region pooling does; then fails to trace."""

    def __init__(self, traces: bool) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.scale: Any = None
        self.traces = traces

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.mean()
        y: Tensor = self.body(x) * self.scale
        return y if self.traces or y.sum() > 0 else -y


@pytest.mark.parametrize("traces", [True, False])
def test_what_a_module_keeps_is_not_a_stand_in_of_the_tracer(traces: bool) -> None:
    model = nn.Sequential(_Remembers(traces)).eval()
    try:
        trace(model)
    except TraceError:
        assert not traces
    assert model[0].scale is None
    assert isinstance(model(torch.randn(2, 4)), Tensor)
