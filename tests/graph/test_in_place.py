"""Networks that run as they are, and are put back: whatever a run writes, nothing of it stays."""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn

from bgd_plugin.graph.in_place import state_kept, untouched
from tests.networks import SmallResNet, images


@dataclass
class _Log:
    """An object of the user's, in which another one is."""

    calls: int = 0
    seen: list[Any] = field(default_factory=list)
    inner: Any = None


class _Network(nn.Module):
    """Holds something, and writes to it in each run."""

    def __init__(self, held: Any, write: Callable[[Any], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.held, self.write = held, write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return self.layer(x)


def _shown(value: Any) -> Any:
    """What can be compared: an object as its attributes, a tensor as numbers."""
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(_shown(k), _shown(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value).__name__, [_shown(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, _Log):
        return _shown(vars(value))
    return repr(value)


def _attribute(net: Any) -> None:
    net.held = net.held + 1


def _new_attribute(net: Any) -> None:
    net.cache = torch.zeros(1)


def _to_list(net: Any) -> None:
    net.held[0].append(1)


def _to_ordered(net: Any) -> None:
    net.held.move_to_end("a")
    net.held["c"] = 3


def _to_dict(net: Any) -> None:
    net.held["inner"][0] = "x"
    del net.held["gone"]


def _to_set(net: Any) -> None:
    net.held.add(3)


def _to_deque(net: Any) -> None:
    net.held.rotate(1)


def _to_counter(net: Any) -> None:
    net.held["calls"] += 1


def _to_object(net: Any) -> None:
    net.held.calls += 1
    net.held.inner.seen.append(net.held.calls)


def _to_tensor(net: Any) -> None:
    net.held.add_(1)


def _through_data(net: Any) -> None:
    net.held.data[0] = 7


def _another_shape(net: Any) -> None:
    net.held.data = torch.zeros(5)


def _to_buffer(net: Any) -> None:
    net.register_buffer("count", torch.ones(1))


def _a_hook(net: Any) -> None:
    net.layer.register_forward_hook(lambda *_: None)


def _a_module(net: Any) -> None:
    net.layer = nn.Linear(3, 3)


def _bound(net: Any) -> None:
    net.held.args[0].append(2)


KNOWN: list[tuple[Any, Callable[[Any], object]]] = [
    (1, _attribute),
    (None, _new_attribute),
    (([1, 2],), _to_list),
    (collections.OrderedDict(a=1, b=2), _to_ordered),
    ({"inner": {0: "y"}, "gone": 1}, _to_dict),
    ({1, 2}, _to_set),
    (collections.deque([1, 2, 3]), _to_deque),
    (collections.Counter(calls=1), _to_counter),
    (_Log(inner=_Log()), _to_object),
    (torch.zeros(3), _to_tensor),
    (torch.zeros(3), _through_data),
    (torch.zeros(3), _another_shape),
    (torch.full((3,), float("nan")), _through_data),
    (None, _to_buffer),
    (None, _a_hook),
    (None, _a_module),
    (functools.partial(max, [1]), _bound),
]


@pytest.mark.parametrize(("held", "write"), KNOWN)
def test_a_network_runs_as_it_is_and_is_put_back(held: Any, write: Any) -> None:
    net = _Network(held, write).train()
    modules, attributes = dict(net.named_modules()), [(m, dict(vars(m))) for m in net.modules()]
    before = _shown(net.held)
    with untouched(net) as (same,):
        assert same is net
        same.eval()
        same(torch.ones(1, 3))
        is_changed = _shown(net.held) != before or dict(net.named_modules()) != modules
        assert is_changed or any(
            [*map(id, vars(m).values())] != [*map(id, a.values())] or any(map(len, _tables(m))) for m, a in attributes
        )
    assert repr(_shown(net.held)) == repr(before)
    assert net.training and net.held is held and dict(net.named_modules()) == modules
    for module, known in attributes:
        assert list(vars(module)) == list(known) and all(vars(module)[name] is value for name, value in known.items())
        assert not any(map(len, _tables(module)))


def _tables(module: nn.Module) -> list[Any]:
    return [table for name, table in vars(module).items() if name.endswith("_hooks") or name == "_buffers"]


class _Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


def _array(net: Any) -> None:
    net.held += 1


def _draw(net: Any) -> None:
    net.held.random()


def _slot(net: Any) -> None:
    net.held.calls += 1


def _deep(net: Any) -> None:
    value = net.held
    while value[0]:
        value = value[0]
    value.append(1)


@pytest.mark.parametrize(
    ("held", "write", "show"),
    [
        (numpy.zeros(2), _array, lambda held: held.tolist()),
        (random.Random(0), _draw, lambda held: held.getstate()),
        (_Slots(), _slot, lambda held: held.calls),
        (iter([1, 2, 3]), lambda net: next(net.held), lambda held: held.__length_hint__()),
        (functools.reduce(lambda inner, _: [inner], range(12), [[]]), _deep, repr),
    ],
)
def test_what_cannot_be_put_back_is_a_copys(held: Any, write: Any, show: Any) -> None:
    net = _Network(held, write)
    before = show(net.held)
    with untouched(net) as (other,):
        assert other is not net and other.layer.weight is net.layer.weight
        other(torch.ones(1, 3))
        assert show(other.held) != before
    assert show(net.held) == before


def test_after_an_error_too() -> None:
    net = _Network([1], lambda net: net.held.append(2))
    with pytest.raises(ValueError, match="wrong"), untouched(net) as (same,):
        same(torch.ones(1, 3))
        raise ValueError("wrong")
    assert net.held == [1]


def test_a_graph_and_the_network_that_it_shares_modules_with() -> None:
    """Of two networks that hold the same module, both are put back, whatever they hold besides."""
    net = SmallResNet().train()
    graph = fx.symbolic_trace(net)
    statistics = {name: x.clone() for name, x in net.state_dict().items()}
    with untouched(graph, net) as networks:
        assert networks == [graph, net]
        for one in networks:
            one(images(1)[0])
        assert any(not torch.equal(x, statistics[name]) for name, x in net.state_dict().items())
    assert all(torch.equal(x, statistics[name]) for name, x in net.state_dict().items())


def test_one_network_twice_and_within_itself() -> None:
    net = _Network([1], lambda net: net.held.append(2))
    with untouched(net, net) as (one, two):
        assert one is two is net
        with untouched(net) as (inner,):
            inner(torch.ones(1, 3))
        assert net.held == [1]
        one(torch.ones(1, 3))
    assert net.held == [1]


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.still = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("past", torch.zeros(4))
        self.register_buffer("sum", torch.zeros(4))
        self.calls, self.kept, self.plain = 0, [1], torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(2)
        self.past = x.mean(0)
        self.sum += x.mean(0)
        self.plain.add_(1)
        self.cache = x
        self.layer.seen = x
        return self.still(self.layer(x))


@torch.no_grad()
def test_everything_is_as_before_and_the_writers_are_known() -> None:
    network = Writes()
    with state_kept(network.named_modules()) as written:
        network(torch.ones(3, 4))
    assert written == {"", "layer"}
    assert (network.calls, network.kept, network.plain.tolist()) == (0, [1], [0, 0])
    assert not network.past.any()
    assert not network.sum.any()
    assert not hasattr(network, "cache")


def test_nothing_written_is_nothing_put_back() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with state_kept(network.named_modules()) as written:
        network(torch.ones(3, 4))
    assert written == set()
