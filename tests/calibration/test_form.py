"""A graph is fitted where it gives the network's own outputs; otherwise the network itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch, form
from bgd_plugin.calibration.form import checked, shared_difference
from bgd_plugin.errors import TraceError
from bgd_plugin.graph import front_end

X = torch.ones(2, 3)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0, other: Any = None) -> Tensor:
        y = self.layer(x) * scale
        return y if other is None else y + other


@pytest.mark.parametrize(
    "batch", [Batch((X,)), Batch((X, 2.0)), Batch((X,), {"other": X}), Batch((X,), {"scale": 3.0, "other": None})]
)
def test_a_graph_is_made_for_the_arguments_that_are_given(batch: Batch) -> None:
    network = _Scaled().eval()
    front = checked(front_end(network), [batch, batch])
    assert isinstance(front.network, fx.GraphModule) and not front.reason
    with torch.no_grad():
        assert shared_difference(front.network, network, [batch]) == ""


def test_the_plain_call_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    retraced = form.retraced
    monkeypatch.setattr(form, "retraced", lambda front, given: (traced.append(given), retraced(front, given))[1])
    front = front_end(_Scaled().eval())
    assert checked(front, [Batch((X,))]) is front and not traced
    checked(front, [Batch((X, 2.0))])
    assert len(traced) == 1


def test_where_the_graph_answers_differently_the_network_itself_is_fitted() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.layer.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (1 if isinstance(x, fx.Proxy) else 2)

    front = checked(front_end(Odd().eval()), [Batch((X,))])
    assert front.network is front.own and "its graph answers calibration batch 0 differently" in front.reason


def test_a_graph_with_a_hook_of_its_own_is_refused() -> None:
    graph = fx.symbolic_trace(_Scaled().eval().layer)
    checked(front_end(graph), [Batch((X,))])
    graph.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(TraceError, match="the network does more than its graph"):
        checked(front_end(graph), [Batch((X,))])


def test_a_difference_in_one_process_counts_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 3).eval()
    graph = fx.symbolic_trace(nn.Sequential(layer))
    seen: list[bool] = []
    monkeypatch.setattr(form, "largest", lambda found: seen.append(found) or 1)
    assert shared_difference(graph, nn.Sequential(layer), [Batch((X,))]) == "they differ on another process's batches"
    assert seen == [False]
