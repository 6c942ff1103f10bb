"""From whose outputs a tensor was computed: through operators, writes, views, and memory that is used again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.readers import DECIDED, Dataflow, is_plain, tensors_in

aten: Any = torch.ops.aten


def _marked(*names: str) -> tuple[Dataflow, list[Tensor]]:
    """A flow in which each module has returned a tensor."""
    flow, tensors = Dataflow(), [torch.randn(2, 3) for _ in names]
    for name, tensor in zip(names, tensors, strict=True):
        flow.left(name, (), tensor)
    return flow, tensors


def test_a_result_comes_from_all_that_its_arguments_come_from() -> None:
    flow, (a, b) = _marked("a", "b")
    total, stacked = a + b, torch.cat([a, a])
    flow.computed(aten.add.Tensor, (a, b), total)
    flow.computed(aten.cat.default, ([a, a],), stacked)
    assert flow.sources([a]) == {"a"} and flow.sources([total]) == {"a", "b"} and flow.sources([stacked]) == {"a"}
    assert flow.sources([a, b]) == {"a", "b"} and flow.sources([]) == flow.sources([torch.ones(1)]) == frozenset()
    scaled = total * 2
    flow.computed(aten.mul.Tensor, {"self": total, "other": 2}, scaled)
    assert flow.sources([scaled]) == {"a", "b"}


def test_who_reads_what_is_recorded_for_each_source() -> None:
    flow, (a, b) = _marked("a", "b")
    total = a + b
    flow.computed(aten.add.Tensor, (a, b), total)
    flow.read("layer", [total])
    flow.read("norm", [b])
    flow.read("nothing", [torch.ones(1)])
    assert flow.readers == {"a": {"layer"}, "b": {"layer", "norm"}}


def test_a_module_reads_what_its_output_is_made_of() -> None:
    flow, (a,) = _marked("a")
    output = a.exp()
    flow.computed(aten.exp.default, (a,), output)
    flow.left("b", (a,), output)
    assert flow.readers == {"a": {"b"}} and flow.sources([output]) == {"b"}


def test_what_a_module_passes_on_unchanged_keeps_its_sources() -> None:
    flow, (a,) = _marked("a")
    flow.left("b", ([a],), {"same": a, "view": a[0]})
    assert flow.sources([a]) == {"a", "b"}
    other = torch.randn(2)
    flow.left("c", (a,), other)
    assert flow.sources([other]) == {"c"}


def test_values_that_decide_which_code_runs_are_read_by_no_module() -> None:
    flow, (a, b) = _marked("a", "b")
    for operator, arguments in (
        (aten._local_scalar_dense.default, (a.sum(),)),
        (aten.nonzero.default, (b,)),
        (aten.equal.default, (b, torch.ones(2, 3))),
    ):
        for t in arguments:
            flow.computed(aten.sum.default, (a,), t) if t is not b and t.ndim == 0 else None
        flow.computed(operator, arguments, 1.0)
    assert flow.readers == {"a": {DECIDED}, "b": {DECIDED}}


def test_what_is_written_to_comes_from_what_is_written_as_well() -> None:
    flow, (a, b) = _marked("a", "b")
    flow.computed(aten.add_.Tensor, (a, b), a.add_(b))
    assert flow.sources([a]) == {"a", "b"} and flow.sources([b]) == {"a", "b"}  # what writes may write to any of them
    flow, (a, b) = _marked("a", "b")
    view = a.view(6)
    flow.computed(aten.view.default, (a, [6]), view)
    assert flow.sources([view]) == {"a"}
    flow.computed(aten.add.Tensor, (view, b.view(6)), view + b.view(6))
    assert flow.sources([a]) == {"a"}


def test_a_result_in_new_memory_forgets_what_that_memory_held() -> None:
    flow, (a,) = _marked("a")
    fresh = torch.ones(3)
    memory = fresh.untyped_storage()._cdata
    flow.computed(aten.exp.default, (a,), fresh)
    assert flow.sources([fresh]) == {"a"}
    flow.computed(aten.ones.default, ([3],), fresh)  # a result that reads nothing
    assert flow.sources([fresh]) == frozenset() and memory not in flow._sources


def test_no_other_memory_takes_the_number_of_one_that_is_known() -> None:
    flow = Dataflow()
    numbers = set[int]()
    for _ in range(50):
        tensor = torch.randn(64)
        flow.left("a", (), tensor)
        numbers.add(int(tensor.untyped_storage()._cdata))
        del tensor
    assert len(numbers) == 50 and not flow.sources([torch.randn(64)])


def test_sparse_tensors_are_known_by_themselves() -> None:
    flow, sparse = Dataflow(), torch.eye(3).to_sparse()
    flow.left("a", (), sparse)
    assert flow.sources([sparse]) == {"a"} and flow.sources([torch.eye(3).to_sparse()]) == frozenset()


def test_trees_of_tensors_and_constants_are_plain() -> None:
    a = torch.ones(1)
    nested = {"x": [a, (1, "text", None, 2.5, True, torch.float32, torch.device("cpu"))], "y": a + 1}
    assert [float(t) for t in tensors_in(nested)] == [1.0, 2.0]
    assert is_plain(nested) and is_plain(a) and is_plain(None)
    assert not is_plain([a, nn.Identity()]) and not is_plain(object()) and not is_plain({"x": iter([])})
