"""Runs on batches of the same shapes: when one of them tells about all, and that nothing else comes of it."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Batch, Batches, Rerun, rerun
from bgd_plugin.calibration.course import shapes_of
from bgd_plugin.calibration.recording import recorded
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module

WIDTH = 8


class Net(nn.Module):
    """Two layers, between which something happens to the first one's output."""

    def __init__(self, between: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        other = self.between(y) if self.between is not None else None
        return self.second(torch.tanh(other if isinstance(other, Tensor) and other.shape == y.shape else y))


FIXED: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(-1),
    "indices": lambda x: x[torch.arange(len(x))],
    "integers": lambda x: x + torch.arange(WIDTH),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
    "shapes": lambda x: x * 2 if x.shape[0] > 2 else x,
    "noise": torch.rand_like,
}
BY_VALUE: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(torch.ones(3, dtype=torch.int64).sum()),
    "int": lambda x: int(torch.tensor(3)),
    "index": lambda x: range(4)[torch.tensor(2)],
    "tolist": lambda x: torch.arange(4).tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "array": lambda x: np.asarray(x.detach()),
    "dlpack": lambda x: np.from_dlpack(x.detach()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: torch.arange(4).nonzero(),
    "mask": lambda x: torch.arange(4)[torch.arange(4) > 1],
    "unique": lambda x: torch.arange(4).unique(),
    "contains": lambda x: 3 in torch.arange(4),
    "comparison": lambda x: torch.where(x > 0, x, 0.1 * x),
    "argmax": lambda x: x.argmax(-1),
    "topk": lambda x: x.topk(2).values,
}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {path: m.weight for path, m in network.named_modules() if isinstance(m, nn.Linear)}


def _recording(network: nn.Module) -> Any:
    return recorded(network.eval(), Batch((torch.randn(4, WIDTH),)), _weights(network), [])


@pytest.mark.parametrize("name", FIXED)
def test_a_course_depends_on_shapes_alone(name: str) -> None:
    assert _recording(Net(FIXED[name])).is_fixed


@pytest.mark.parametrize("name", BY_VALUE)
def test_a_course_may_depend_on_values(name: str) -> None:
    assert not _recording(Net(BY_VALUE[name])).is_fixed


def test_batches_are_alike_if_only_their_values_differ() -> None:
    x = torch.randn(4, WIDTH)
    same = shapes_of(Batch((x,), {"scale": 2}))
    assert same is not None and same == shapes_of(Batch((torch.randn(4, WIDTH),), {"scale": 2}))
    others = [
        Batch((x[:3],), {"scale": 2}),
        Batch((x.double(),), {"scale": 2}),
        Batch((torch.randn(WIDTH, 4).t(),), {"scale": 2}),
        Batch((x,), {"scale": 2.0}),
        Batch((x,), {"scale": True}),
        Batch((x,), {"scale": 3}),
        Batch((x,), {"other": 2}),
        Batch((x, 2)),
        Batch(((x,),), {"scale": 2}),
    ]
    keys = [shapes_of(batch) for batch in others]
    assert same not in keys and len(set(keys)) == len(others)
    assert shapes_of(Batch((x,), {"scale": object()})) is None and shapes_of(Batch((x.to_sparse(),))) is None


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often a network is recorded."""
    made = Counter[str]()
    monkeypatch.setattr(rerun, "recorded", lambda *given: (made.update(["run"]), recorded(*given))[1])
    return made


def _rerun(network: nn.Module, data: list[Tensor]) -> Rerun:
    student = copy_module(network, share_tensors=True)
    student.first = nn.Linear(WIDTH, WIDTH)  # as if it were quantized
    return Rerun(student, network, Batches.of([Batch((x,)) for x in data]), _weights(network), [])


@torch.no_grad()
def _given(network: Net, x: Tensor) -> Tensor:
    y = network.first(x)
    return torch.tanh(y if network.between is None else network.between(y))


@torch.no_grad()
@pytest.mark.parametrize(
    ("between", "count"), [(None, 2), (lambda x: x * 2 if torch.tensor([3]).tolist() == [3] else x, 5)]
)
def test_one_run_tells_about_all_batches_of_its_shapes(between: Any, count: int, runs: Counter[str]) -> None:
    torch.manual_seed(0)
    network, data = Net(between).eval(), [torch.randn(n, WIDTH) for n in (4, 4, 2, 4, 2)]
    walk = _rerun(network, data)
    assert runs["run"] == count and walk.order == ["first", "second"] and walk.times("second") == 5
    for (mine, theirs, _), x in zip(walk.inputs("second").pairs(), data, strict=True):
        torch.testing.assert_close(mine, _given(walk.student, x))
        torch.testing.assert_close(theirs, _given(network, x))
    assert not walk.is_whole and not walk.strayed


@torch.no_grad()
def test_a_network_that_writes_to_its_state_is_recorded_on_every_batch(runs: Counter[str]) -> None:
    network = Net()
    network.register_buffer("sums", torch.zeros(WIDTH))
    network.between = lambda x: (network.sums.add_(x.sum(0)), x)[1]
    walk = _rerun(network.eval(), [torch.randn(4, WIDTH) for _ in range(3)])
    assert runs["run"] == 3 and walk.records.written and not network.sums.any()


class Hidden(nn.Module):
    """Reads a value where nobody can see it, and runs a layer of its own for some."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.some, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if ctypes.c_float.from_address(x.data_ptr()).value > 0:
            y = self.some(y)
        return self.second(torch.tanh(y))


@torch.no_grad()
def test_a_course_that_depends_on_values_in_secret_is_noticed_when_it_is_walked() -> None:
    network = Hidden().eval()
    data = [sign * torch.rand(4, WIDTH) for sign in (1.0, -1.0, 1.0)]
    walk = _rerun(network, data)
    assert len(list(walk.inputs("some").pairs())) == 2 and walk.is_whole
    for (mine, theirs, _), x in zip(walk.inputs("second").pairs(), data, strict=True):
        for side, found in ((walk.student, mine), (network, theirs)):
            y = side.first(x)
            torch.testing.assert_close(found, torch.tanh(side.some(y) if x[0, 0] > 0 else y))


def test_a_batch_that_fails_is_named(runs: Counter[str]) -> None:
    network = nn.Sequential(nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)).eval()
    batches = [Batch((torch.tensor([[n]]),)) for n in (3, 4, 17)]
    walk = Rerun(network, network, Batches.of(batches), {"1": network[1].weight}, [])
    assert runs["run"] == 1
    with pytest.raises(CalibrationError, match="fails on calibration batch 2"):
        walk.inputs("1")


class Untraceable(Net):
    """Which runs a number of times that depends on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0] // 2):
            x = super().forward(x)
        return x


def test_a_whole_fit_is_the_same_whether_each_batch_is_recorded_or_one(
    monkeypatch: pytest.MonkeyPatch, runs: Counter[str]
) -> None:
    data, results, counts = [torch.randn(8, 64) for _ in range(3)], [], []
    for shapes in (shapes_of, lambda _: None):
        monkeypatch.setattr(rerun, "shapes_of", shapes)
        torch.manual_seed(0)
        network, before = Untraceable().eval(), runs["run"]
        results.append(bgd.quantize(network, data, bgd.BGDConfig(rounds=1), progress=False))
        counts.append(runs["run"] - before)
    one, other = (result.model.state_dict() for result in results)
    assert 0 < counts[0] < counts[1]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
