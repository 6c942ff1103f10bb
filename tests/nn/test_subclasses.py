"""Quantized layers in the place of subclasses that compute as their base: what these have of their own stays."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.nn import PQLinear
from tests.networks import em, vectors


class Named(nn.Linear):
    """A linear layer with attributes, a buffer, a parameter, a property and methods of its own."""

    labels = ("a", "b")

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = 2.0
        self.register_buffer("mean", torch.full((outputs,), 3.0))
        self.gain = nn.Parameter(torch.rand(outputs))

    @property
    def twice(self) -> float:
        return 2 * self.scale

    def normalized(self, x: Tensor) -> Tensor:
        return (self(x) - self.mean) * self.gain * self.twice  # type: ignore[operator]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), Named(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b.normalized(torch.tanh(self.a(x)))


@pytest.mark.parametrize("branches", [False, True])
def test_what_a_subclass_has_of_its_own_stays(branches: bool, tmp_path: Path) -> None:
    kind: Any = Net
    if branches:

        class Branching(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum() < 1e9 else x

        kind = Branching
    model = kind().eval()
    result = bgd.quantize(model, vectors(), em(), progress=False)
    layer: Any = result.model.b
    assert isinstance(layer, PQLinear)
    assert (layer.scale, layer.twice, layer.labels) == (2.0, 4.0, ("a", "b"))
    assert set(model.state_dict()) - set(result.model.state_dict()) == {"b.weight"}
    x = vectors()[0]
    with torch.no_grad():
        wanted = result.model(x)
        bgd.save(result.model, tmp_path / "net")
        like = kind().eval()
        like.b.mean.zero_()
        for other in (
            bgd.load(tmp_path / "net", like=like),
            copy.deepcopy(result.model),
            bgd.materialize(result.model),
        ):
            torch.testing.assert_close(other(x), wanted)
    dense: Any = bgd.materialize(result.model).b
    assert type(dense) is Named
    assert dense.twice == 4.0


def test_pickled_by_its_own_class() -> None:
    result = bgd.quantize(Net().eval(), vectors(), em(), progress=False).model
    again = pickle.loads(pickle.dumps(result.b))
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(again.normalized(x), result.b.normalized(x))


def test_what_nobody_has_is_an_error() -> None:
    layer = bgd.quantize(Net().eval(), vectors(), em(), progress=False).model.b
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
