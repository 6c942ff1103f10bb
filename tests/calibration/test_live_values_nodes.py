"""One node of a walk: whether it writes in place, what it may not write to, and which values it is the last to read."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bgd_plugin.calibration import Batch, Walk
from bgd_plugin.calibration.nodes import _filled, _own_memory_, _writes_in_place, last_uses, run_node
from bgd_plugin.errors import CalibrationError


def _node(op: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.create_node(op, target, (x, *args), kwargs)


@pytest.mark.parametrize(
    ("op", "target", "args", "kwargs", "writes"),
    [
        ("call_method", "add_", (1,), {}, True),
        ("call_method", "add", (1,), {}, False),
        ("call_method", "__setitem__", (0, 1), {}, True),
        ("call_method", "__getitem__", (0,), {}, False),
        ("call_method", "__add__", (1,), {}, False),
        ("call_method", "T", (), {}, False),
        ("call_function", torch.relu_, (), {}, True),
        ("call_function", torch.relu, (), {}, False),
        ("call_function", operator.iadd, (1,), {}, True),
        ("call_function", operator.setitem, (0, 1), {}, True),
        ("call_function", operator.add, (1,), {}, False),
        ("call_function", functional.relu, (), {"inplace": True}, True),
        ("call_function", functional.relu, (), {"inplace": False}, False),
        ("call_function", functional.relu, (True,), {}, True),
        ("call_function", functional.relu, (1,), {}, False),
        ("call_function", torch.ops.aten.add_.Tensor, (1,), {}, True),
        ("call_function", torch.ops.aten.add.Tensor, (1,), {}, False),
    ],
)
def test_what_writes_in_place(op: str, target: Any, args: Any, kwargs: Any, writes: bool) -> None:
    assert _writes_in_place(_node(op, target, *args, **kwargs), None) is writes


def test_a_module_writes_if_a_part_of_it_does() -> None:
    node = _node("call_module", "part")
    assert _writes_in_place(node, nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)))
    assert not _writes_in_place(node, nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_shared_memory_is_copied_once_and_views_stay_views() -> None:
    whole, other = torch.arange(6.0), torch.ones(2)
    values: dict[str, Any] = {"whole": whole, "rows": [whole.view(2, 3)], "part": whole[2:4], "other": other}
    _own_memory_(values, ["part", "other"], ({"x": whole},))
    values["part"].fill_(-1)
    assert whole.tolist() == [0, 1, 2, 3, 4, 5] and values["whole"].tolist() == [0, 1, -1, -1, 4, 5]
    assert values["rows"][0].tolist() == [[0, 1, -1], [-1, 4, 5]] and values["other"] is other
    before = dict(values)
    _own_memory_(values, ["part"], ({"x": whole},))
    assert all(values[name] is before[name] for name in values)  # nothing is shared any more


def test_a_node_that_writes_leaves_protected_values_alone() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    graph = fx.symbolic_trace(Writes())
    node = next(n for n in graph.graph.nodes if n.op == "call_method")
    for protects in (True, False):
        x = torch.zeros(2)
        values = {"x": x}
        run_node(graph, node, values, protected=({"given": x},) if protects else ())
        assert values[node.name].tolist() == [1, 1] and x.tolist() == ([0, 0] if protects else [1, 1])


def test_each_value_is_dropped_after_its_last_use_but_not_the_answer() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            a = torch.exp(x)
            torch.sin(x)  # nobody reads it
            return torch.cos(a), a

    graph = fx.symbolic_trace(Net())
    assert last_uses(list(graph.graph.nodes)) == {"sin": ["x", "sin"], "output": ["output"]}


def test_arguments_become_lists_and_dicts_that_functions_may_write_to() -> None:
    node = _node("call_function", torch.cat, [1, [2, (3, [4])]], x={"a": [5]})
    found = _filled(node.args[1], {})
    assert found == [1, [2, (3, [4])]] and type(found) is list and type(found[1]) is list
    assert type(found[1][1]) is tuple and type(found[1][1][1]) is list
    named = _filled(node.kwargs, {})
    assert named == {"x": {"a": [5]}} and type(named["x"]) is dict and type(named["x"]["a"]) is list
    size = torch.Size([2, 3])
    assert _filled(size, {}) is size


def test_values_stand_where_nodes_stood_and_are_the_values_themselves() -> None:
    graph = fx.Graph()
    x, n = graph.placeholder("x"), graph.placeholder("n")
    written = [torch.zeros(2)]
    node = graph.create_node("call_function", operator.getitem, (x, (slice(None, n), slice(n, None, n))), {"k": [x]})
    args, kwargs = _filled(node.args, {"x": written, "n": 2}), _filled(node.kwargs, {"x": written, "n": 2})
    assert args == (written, (slice(None, 2), slice(2, None, 2))) and kwargs == {"k": [written]}
    assert args[0] is written and kwargs["k"][0] is written  # a function may write to it


def test_a_slice_as_long_as_another_value_is_walked() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            half = hidden.shape[1] // 2
            return self.last(hidden[:, :half] * hidden[:, half:])

    model, x = Halves().eval(), torch.randn(5, 8)
    walk = Walk(fx.symbolic_trace(model), [Batch((x,))])
    for node in walk.nodes():
        if node.target == "last":
            torch.testing.assert_close(walk.finish(0), model(x))


def test_a_node_that_fails_is_named_with_its_error() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))
    node = next(n for n in graph.graph.nodes if n.op == "call_module")
    with pytest.raises(CalibrationError, match=r"the network fails on a calibration batch, at .*0.*: mat1"):
        run_node(graph, node, {"input_1": torch.ones(2, 5)})


def test_a_walk_says_where_it_is_and_counts_its_time() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x * self.scale)

    walk = Walk(fx.symbolic_trace(Net()), [Batch((torch.ones(2),)), Batch((torch.zeros(2),))])
    places = [walk.place for _ in walk.nodes()]
    assert places[0] == "scale" and type(places[1]) is str and "exp" in places[-1]
    assert walk.batch_count == 2 and walk.seconds > 0


def test_a_weight_that_is_read_as_a_value_makes_all_behind_it_differ() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(torch.sin(x) * self.scale)

    student, reference = fx.symbolic_trace(Net()), fx.symbolic_trace(Net())
    student.scale = nn.Parameter(torch.full((1,), 2.0))
    walk = Walk(student, [Batch((torch.ones(2),))], reference)
    sin, exp = (next(n for n in walk.order if n.name == name) for name in ("sin", "exp"))
    assert not walk.differs_at(exp)
    walk.mark_changed("scale")
    assert walk.differs_at(exp) and not walk.differs_at(sin)
    for node in walk.nodes():
        if node is exp:
            assert not walk.differs(sin) and walk.differs(exp.all_input_nodes[0])
