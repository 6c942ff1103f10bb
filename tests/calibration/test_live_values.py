"""The one walk over the graph gives what plain forward passes give, for student and reference, in place or not."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch, Batches, Walk
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module, trace
from tests.networks import SmallResNet, images, randomized, vectors


class InPlace(nn.Module):
    """In-place operators of each kind, on values that are used again later, and on views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        kept = y
        y += self.b(y)
        y = self.c(self.relu(y)) + kept
        z = y.flatten(1)
        z.mul_(0.5)
        z = F.relu(z, inplace=True) + y
        return torch.clamp_(z, max=3.0) + x.view(-1, 12)


class OnTheInput(nn.Module):
    """Works in place on its input, of which a part is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x, inplace=True)
        return self.b(self.a(y)) + self.c(x)


class Hidden(nn.Module):
    """In place inside a part that is one node in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.leaf = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaf(x)
        return self.c(self.b(self.a(y))) + x


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "leaf" or super().is_leaf_module(m, module_qualified_name)


NETWORKS = {
    "resnet": (SmallResNet, images(2), "conv1", "conv2"),
    "in place": (InPlace, vectors(2), "a", "b"),
    "on the input": (OnTheInput, vectors(2), "a", "c"),
    "hidden": (lambda: fx.GraphModule(model := Hidden(), _LeafTracer().trace(model)), vectors(2), "a", "c"),
}


def _setting(network: str) -> tuple[Any, list[Tensor], str, str]:
    kind, data, first, second = NETWORKS[network]
    return trace(randomized(kind())), data, first, second


def _batches(data: list[Tensor], memory_bytes: int | None = None) -> Batches:
    return Batches.of([Batch((batch,)) for batch in data], memory_bytes)


def _outputs(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch.clone()) for batch in data]


def _same(found: list[Any], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def _change(walk: Walk, target: str) -> None:
    """Put another layer into the student, as quantization does."""
    new = copy.deepcopy(walk.student.get_submodule(target))
    new.weight.mul_(-1.5)
    setattr(walk.student, target, new)
    walk.mark_changed(target)


# None: all in memory. 1: all on file. The third: one of the two batches fits, some of the time.
BOUNDS = [None, 1, 8_000]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_output_from_any_point_on_is_that_of_a_forward_pass(
    network: str, with_reference: bool, bound: int | None
) -> None:
    student, data, first, second = _setting(network)
    reference = copy_module(student, share_tensors=True) if with_reference else None
    walk = Walk(student, _batches(data, bound), reference)
    for node in walk.nodes():
        if node.target in (first, second):
            _change(walk, str(node.target))
        expected = _outputs(student, data)
        for _ in range(2):  # looking ahead changes nothing that it or the walk finds later
            with torch.no_grad():
                assert _same([walk.finish(i) for i in range(2)], expected), node.name


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_reference_has_the_values_of_the_float_network(network: str, bound: int | None) -> None:
    student, data, first, second = _setting(network)
    reference = copy_module(student, share_tensors=True)
    expected = _outputs(reference, data)
    walk = Walk(student, _batches(data, bound), reference)
    for node in walk.nodes():
        if node.target in (first, second):
            _change(walk, str(node.target))
    (output,) = [node for node in student.graph.nodes if node.op == "output"]
    pairs = list(walk.pairs(output.args[0]))
    assert _same([theirs for _, theirs in pairs], expected)
    assert _same([mine for mine, _ in pairs], _outputs(student, data))
    assert not _same([mine for mine, _ in pairs], expected)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_calibration_data_is_not_written_to(network: str, bound: int | None) -> None:
    student, data, first, _ = _setting(network)
    before = copy.deepcopy(data)
    walk = Walk(student, _batches(data, bound), copy_module(student, share_tensors=True))
    for node in walk.nodes():
        if node.target == first:
            _change(walk, first)
        with torch.no_grad():
            walk.finish(0)
    assert _same(list(data), before)


def test_gradients_flow_from_the_output_to_the_layer_at_hand() -> None:
    student, data, first, _ = _setting("resnet")
    student.requires_grad_(False)
    walk = Walk(student, [Batch((batch,)) for batch in data])
    for node in walk.nodes():
        if node.target == first:
            break
    layer = student.get_submodule(first).requires_grad_(True)
    walk.finish(0).square().sum().backward()
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    student(data[0]).square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad)


def test_a_value_that_is_computed_ahead_is_that_of_a_forward_pass() -> None:
    model = trace(nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)))
    data = vectors(1)
    walk = Walk(model, [Batch((data[0],))])
    for node in walk.nodes():
        if node.target == "0":
            later = next(n for n in walk.order if n.target == "1")
            assert torch.equal(walk.student_value(later, 0), model.get_submodule("0")(data[0]).relu())


def test_until_the_first_change_the_two_share_their_values() -> None:
    student, data, first, _ = _setting("resnet")
    walk = Walk(student, [Batch((data[0],))], copy_module(student, share_tensors=True))
    differing = []
    for node in walk.nodes():
        if node.target == first:
            _change(walk, first)
        differing += [n.name for n in walk.order[: walk.position] if walk.differs(n) and n.name not in differing]
    assert differing[0] == first
    assert "bn1" not in differing
    assert "down" not in differing
    assert "fc" in [n.name for n in walk.order if walk.differs(n)]


def test_values_that_no_later_node_reads_are_freed() -> None:
    student, data, _, _ = _setting("resnet")
    walk = Walk(student, [Batch((data[0],))])
    most = 0
    for _ in walk.nodes():
        most = max(most, len(walk.student_values[0]))
    assert most <= 4
    assert len(walk.order) > 12


def test_a_network_that_fails_on_a_batch_names_the_node() -> None:
    model = trace(nn.Sequential(nn.Linear(12, 8), nn.Linear(9, 4)))
    walk = Walk(model, [Batch((vectors()[0],))])
    with pytest.raises(CalibrationError, match=r"the network fails on a calibration batch, at layer '1': "):
        list(walk.nodes())


def _narrowed(sizes: list[int], options: dict[str, list[int]], limit: int) -> int:
    """Writes into its arguments, as torchvision's video transformers do where a window is larger than the input."""
    sizes[0] = min(sizes[0], limit)
    options["sizes"][0] = sizes[0]
    return sizes[0]


fx.wrap("_narrowed")


class WritesIntoArguments(nn.Module):
    """Calls a function that changes the lists it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x * _narrowed([50, 50], {"sizes": [50]}, x.shape[1])


def test_functions_may_write_into_their_lists() -> None:
    model, x = trace(WritesIntoArguments()), vectors()[0]
    walk = Walk(model, [Batch((x,))])
    assert "_narrowed" in [node.name for node in walk.nodes()]
    torch.testing.assert_close(model(x), 12 * x)


@pytest.mark.parametrize("bound", BOUNDS)
def test_two_walks_over_one_set_of_batches_do_not_disturb_each_other(bound: int | None) -> None:
    student, data, _, _ = _setting("resnet")
    batches = _batches(data, bound)
    ahead = Walk(student, batches)
    behind = Walk(student, batches)  # begins anew, and would overwrite what the first one lives on
    expected = _outputs(student, data)
    nodes = behind.nodes()
    for count, node in enumerate(ahead.nodes()):
        if count % 2:
            next(nodes)
        with torch.no_grad():
            assert _same([ahead.finish(i) for i in range(2)], expected), node.name
            assert _same([behind.finish(i) for i in range(2)], expected), node.name


def test_what_a_walk_has_kept_goes_with_it() -> None:
    student, data, _, _ = _setting("resnet")
    batches = _batches(data, 1)
    walk = Walk(student, batches)
    for _ in walk.nodes():
        pass
    assert len(batches.store.open(0)) > 1
    del walk
    gc.collect()
    assert list(batches.store.open(0)) == ["batch"]
    assert list(batches.store.open(1)) == ["batch"]
    again = Walk(student, batches)
    with torch.no_grad():
        assert _same([again.finish(i) for i in range(2)], _outputs(student, data))


def _branches() -> Any:
    """Two layers on one input, of which the second comes later."""
    return fx.symbolic_trace(_TwoSides().eval())


class _TwoSides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) + self.b(x) * self.scale)


def test_what_will_differ_is_known_before_it_runs() -> None:
    student = _branches()
    nodes = {node.name: node for node in student.graph.nodes}
    for target, differing in (("a", {"a", "relu", "add", "c"}), ("scale", {"scale", "mul", "add", "c"})):
        walk = Walk(student, _batches(vectors(2)), copy_module(student, share_tensors=True))
        walk.mark_changed(target)
        assert {name for name, node in nodes.items() if node.op != "output" and walk.differs_at(node)} == differing
        for node in walk.nodes():
            if node.name == "c":
                assert {name for name in nodes if walk.differs_at(nodes[name])} >= differing
                assert not walk.differs_at(nodes["x"])
    walk = Walk(student, _batches(vectors(2)), copy_module(student, share_tensors=True))
    for node in walk.nodes():
        if node.name == "b":
            walk.mark_changed("a")  # too late: it has run
            assert not walk.differs_at(nodes["a"]) and not walk.differs_at(nodes["relu"])


def test_looking_ahead_leaves_live_values_and_the_users_data_as_they_are() -> None:
    model = trace(InPlace().eval())
    data = vectors(2)
    before = [batch.clone() for batch in data]
    walk = Walk(model, [Batch((batch,)) for batch in data], copy_module(model, share_tensors=True))
    last = next(node for node in reversed(walk.order) if node.op != "output")
    for number, _ in enumerate(walk.nodes()):
        if number > 3:
            break
        values = {name: value.clone() for name, value in walk.student_values[1].items()}
        with torch.no_grad():
            expected = walk.student_value(last, 1)
            walk.run_ahead(last, 1, torch.no_grad(), of_reference=False)
            walk.run_ahead(last, 1, torch.no_grad(), of_reference=True)
            assert torch.equal(walk.student_value(last, 1), expected)
            assert torch.equal(walk.reference_value(last, 1), expected)
        assert all(torch.equal(value, walk.student_values[1][name]) for name, value in values.items())
    assert all(torch.equal(one, other) for one, other in zip(data, before, strict=True))


def test_the_context_holds_at_the_node_alone() -> None:
    seen: list[bool] = []
    model = trace(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval())
    for layer in model.children():
        layer.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    walk = Walk(model, _batches(vectors(1)))
    node = next(n for n in walk.order if n.target == "2")
    walk.run_ahead(node, 0, torch.inference_mode(), of_reference=False)
    assert seen == [False, False, True]


def test_a_drift_is_what_the_float_network_has_more() -> None:
    student, data, first, _ = _setting("resnet")
    walk = Walk(student, _batches(data), copy_module(student, share_tensors=True))
    for node in walk.nodes():
        if node.target == first:
            _change(walk, first)
        elif walk.position and walk.differs(walk.order[walk.position - 1]):
            before = walk.order[walk.position - 1]
            (mine, theirs), *_ = walk.pairs(before)
            assert torch.equal(walk.drift(before, 0), theirs - mine) and bool((theirs != mine).any())
            return
    raise AssertionError("nothing differs")


def test_walks_stop_where_they_are_asked_to_and_compute_the_same() -> None:
    student, data, _, second = _setting("resnet")
    walk = Walk(student, _batches(data))
    stops: list[str] = []
    for node in walk.nodes({second, "fc"}):
        stops.append(node.name)
        assert walk.place == node.target
        with torch.no_grad():
            assert _same([walk.finish(index) for index in range(walk.batch_count)], _outputs(student, data))
    assert stops == [second, "fc"] and walk.seconds > 0
