"""What a network is called with, for its trace: constants, what comes from data, and what cannot be said by names."""

from __future__ import annotations

import math
import re
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.calibration.agreement import (
    _compared,
    answers_differ,
    answers_of,
    difference,
    first_difference,
    given_arguments,
)
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


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (X, X.clone(), ""),
        (X * (1 + 1e-5), X, ""),
        (X * (1 + 1e-3), X, "it is off by 0.001 of its norm"),
        (X.double() * (1 + 1e-7), X.double(), "it is off by"),
        (X.half() * 1.005, X.half(), ""),
        (X, 3, "it is a Tensor, not a int"),
        (3, X, "it is a int, not a Tensor"),
        (X[:1], X, r"it is torch.float32 \[1, 3\], not torch.float32 \[2, 3\]"),
        (X.long(), X, "it is torch.int64"),
        (X.long() + 1, X.long(), "it has other values"),
        (X, torch.zeros(2, 3), "it is off by inf of its norm"),
        (X / torch.zeros(2, 3), X / torch.zeros(2, 3), ""),
        (X / torch.zeros(2, 3), X, "it is off by"),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.nan]), ""),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, 0.0]), "it is off by 0 of its norm"),
        ({"a": X}, {"b": X}, "it has a, not b"),
        ({"a": X, "b": X}, {"b": X, "a": X}, "it has a, b, not b, a"),
        ({"a": X, "b": X + 1}, {"a": X, "b": X}, r"it\['b'\] is off by"),
        ([X, X], [X], "it has 2 parts, not 1"),
        ((X, X + 1), (X, X), r"it\[1\] is off by"),
        ([X], {"a": X}, "it is a list, not a dict"),
        ("a", "b", "it is 'a', not 'b'"),
        (2, 2, ""),
    ],
)
def test_the_first_difference_is_said(found: Any, wanted: Any, said: str) -> None:
    assert re.match(said if said else f"{said}$", first_difference(found, wanted, "it"))


def test_objects_are_compared_by_what_they_hold() -> None:
    assert first_difference(SimpleNamespace(a=X, n=1), SimpleNamespace(a=X, n=1), "it") == ""
    assert "'n'" in first_difference(SimpleNamespace(a=X, n=1), SimpleNamespace(a=X, n=2), "it")


class _Drop(nn.Module):
    """Noise in training mode, and always some from the generator."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) + (10 if self.training else 0)
        return x * self.factor + noise


def test_networks_are_compared_in_evaluation_mode_with_the_same_random_numbers() -> None:
    batches = [Batch((X,)), Batch((X,))]
    one, other = answers_of(_Drop().train(), batches)
    assert torch.equal(one, other) and float(one.max()) < 3
    assert answers_differ(_Drop().eval(), _Drop().eval(), batches) == ""
    assert answers_differ(_Drop().eval(), _Drop(1.5).eval(), batches).startswith(
        "calibration batch 0: its answer is off"
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    answers_of(_Drop(), batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_tensors_of_answers_are_compared() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"logits": (x, [x]), "cache": object()}

    assert answers_differ(Cached(), Cached(), [Batch((X,))]) == ""


def test_a_network_that_fails_names_the_batch() -> None:
    with pytest.raises(CalibrationError, match="the network fails on calibration batch 1"):
        answers_of(nn.Linear(3, 2), [Batch((X,)), Batch((X[:, :2],))])


def test_a_graph_in_training_mode_is_compared_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    graph = fx.symbolic_trace(network)
    assert difference(graph, network.eval(), [Batch((X,))]) == ""


def test_a_graph_that_fails_alone_or_answers_differently_is_told_with_the_batch() -> None:
    class Branch(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit

        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3) if self.limit > 1 else x.reshape(-1, 3)

    graph = fx.symbolic_trace(Branch(2.0))
    said = difference(graph, Branch(0.0), [Batch((X,)), Batch((torch.ones(4, 3),))])
    assert said.startswith("its graph fails on calibration batch 1, the network itself does not")
    assert difference(fx.symbolic_trace(nn.ReLU6()), nn.ReLU(), [Batch((X,)), Batch((9 * X,))]).startswith(
        "its graph answers calibration batch 1 differently: its answer is off by"
    )


def test_of_many_batches_the_first_of_each_form_and_the_last_are_compared() -> None:
    forms = [Batch((torch.ones(n, 3),)) for n in (2, 2, 2, 4, 4, 5, 6, 7, 2, 2)]
    assert _compared(forms) == [0, 1, 3, 5, 6, 9]
    assert _compared(forms[:1]) == [0]
    assert _compared([Batch((X,)), Batch((X, 1)), Batch((X, 2)), Batch((X.long(),)), Batch((X,))]) == [0, 1, 2, 3, 4]
