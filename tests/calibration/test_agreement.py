"""What a network is called with, for its trace: constants, what comes from data, and what cannot be said by names."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.calibration.agreement import difference, given_arguments
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import FROM_DATA

X = torch.ones(2, 3)


class _Network(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, mask: Any = None) -> Tensor:
        return x * scale


class _Open(nn.Module):
    def forward(self, x: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        return x


def _given(*batches: Batch, network: nn.Module | None = None) -> Any:
    return given_arguments(network or _Network(), batches)


def test_tensors_come_from_data_and_the_same_values_are_constants() -> None:
    assert _given(Batch((X,)), Batch((X,))) == {"x": FROM_DATA}
    assert _given(Batch((X, 2.0)), Batch((X,), {"scale": 2.0})) == {"x": FROM_DATA, "scale": 2.0}
    assert _given(Batch((X,), {"mask": None}), Batch((X,), {"mask": None})) == {"x": FROM_DATA, "mask": None}


def test_what_differs_comes_from_data() -> None:
    assert _given(Batch((X, 2.0)), Batch((X, 3.0))) == {"x": FROM_DATA, "scale": FROM_DATA}
    assert _given(Batch((X, 2.0)), Batch((X, 2))) == {"x": FROM_DATA, "scale": FROM_DATA}  # of another type
    assert _given(Batch((X,), {"mask": [X, 1]}), Batch((X,), {"mask": [X, 1]}))["mask"] is FROM_DATA


def test_what_is_given_in_some_batches_only_cannot_be_said() -> None:
    assert _given(Batch((X,)), Batch((X, 2.0))) is None
    assert _given(Batch((X, 2.0)), Batch((X,))) is None


def test_arguments_without_names_cannot_be_said() -> None:
    assert _given(Batch((X,)), network=_Open()) == {"x": FROM_DATA}
    assert _given(Batch((X, X)), network=_Open()) is None
    assert _given(Batch((X,), {"more": X}), network=_Open()) is None


def test_what_hooks_may_change_cannot_be_said() -> None:
    network = _Network()
    network.register_forward_pre_hook(lambda module, args: args)
    assert _given(Batch((X,)), network=network) is None


@pytest.mark.parametrize("batch", [Batch(()), Batch((X,), {"unknown": X}), Batch((X, 1.0, None, X))])
def test_a_batch_that_does_not_fit_is_named_by_its_number(batch: Batch) -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 .*_Network.forward takes x, scale, mask"):
        _given(Batch((X,)), batch)


def test_a_graph_that_is_compared_holds_no_value_longer_than_a_node_reads_it() -> None:
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12))).eval()
    graph = fx.symbolic_trace(network)
    seen: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(weakref.ref(output))
        held.append(sum(one() is not None for one in seen))

    for layer in graph.children():
        layer.register_forward_hook(look)
    assert difference(graph, network, [Batch((X,))]) == ""
    assert max(held[:12]) <= 3  # the graph runs first, then the network, whose layers these are, too
