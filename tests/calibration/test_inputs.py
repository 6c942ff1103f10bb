"""Streamed statistics against explicit unfolding."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bgd_plugin.calibration import Batch, LayerInputs, Walk, pooled_gram, sampled_inputs
from bgd_plugin.calibration import gram_pooled as gram_module
from bgd_plugin.calibration.finite import require_finite
from bgd_plugin.calibration.inputs import CollectedInputs, embedding_inputs
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module, find_layers, trace
from bgd_plugin.pq.blocks import Geometry
from tests.networks import TwiceNet, images, vectors


def _inputs(model: nn.Module, data: list[Tensor], name: str) -> LayerInputs:
    """The inputs of a layer, with the walk standing right before it."""
    graph_module = trace(model.eval())
    (layer,) = [layer for layer in find_layers(graph_module)[0] if layer.name == name]
    walk = Walk(graph_module, [Batch((batch,)) for batch in data])
    for node in walk.nodes():
        if node.name == layer.calls[0]:
            return LayerInputs(walk, name, layer.calls)
    raise AssertionError(name)


def _literal_gram(rows: Tensor, block_size: int) -> Tensor:
    """The mean of x xᵀ over all blocks, one after the other; rows `[positions, D]`."""
    blocks = rows.double().reshape(-1, block_size)
    return sum(torch.outer(x, x) for x in blocks) / len(blocks)


@settings(max_examples=15)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    groups=st.sampled_from([1, 2]),
    block=st.sampled_from([1, 2, "kernel", "row"]),
)
def test_the_pooled_gram_is_that_of_the_unfolded_inputs(
    kernel: int, stride: int, padding: int, groups: int, block: Any
) -> None:
    conv = nn.Conv2d(4, 4, kernel, stride=stride, padding=padding, groups=groups)
    columns = conv.weight[0].numel()
    size = {"kernel": kernel**2, "row": columns}.get(block, block)
    size = size if columns % size == 0 else 1
    data = images(2, size=5, batch=2, channels=4)
    found = pooled_gram(_inputs(nn.Sequential(conv), data, "0"), size)
    unfolded = [F.unfold(x, kernel, padding=padding, stride=stride) for x in data]  # [batch, groups · columns, places]
    rows = torch.cat([u.reshape(2, groups, columns, -1).permute(0, 1, 3, 2).reshape(-1, columns) for u in unfolded])
    torch.testing.assert_close(found.gram, _literal_gram(rows, size), rtol=1e-5, atol=1e-6)
    assert found.count == rows.numel() // size


def test_the_pooled_gram_of_a_linear_layer_takes_every_position() -> None:
    data = [torch.randn(2, 3, 8) for _ in range(2)]
    found = pooled_gram(_inputs(nn.Sequential(nn.Linear(8, 4)), data, "0"), 4)
    torch.testing.assert_close(found.gram, _literal_gram(torch.cat(data).reshape(-1, 8), 4), rtol=1e-5, atol=1e-6)


def test_a_layer_that_runs_twice_pools_the_inputs_of_both_calls() -> None:
    model, data = TwiceNet(), vectors(2)
    found = pooled_gram(_inputs(model, data, "shared"), 4)
    with torch.no_grad():
        first = torch.cat([torch.tanh(model.first(x)) for x in data])
        rows = torch.cat([first, torch.tanh(model.shared(first))])
    torch.testing.assert_close(found.gram, _literal_gram(rows, 4), rtol=1e-5, atol=1e-6)
    assert found.count == 2 * len(first) * 8


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, data = nn.Conv2d(3, 4, 3, padding=1), images(2, size=6)
    whole = pooled_gram(_inputs(nn.Sequential(conv), data, "0"), 9)
    monkeypatch.setattr(gram_module, "_CHUNK_ELEMENTS", 1)
    pieces = pooled_gram(_inputs(nn.Sequential(conv), data, "0"), 9)
    torch.testing.assert_close(pieces.gram, whole.gram, rtol=1e-6, atol=1e-7)
    assert pieces.count == whole.count


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_name_the_layer(bad: float) -> None:
    data = vectors(2)
    data[1][3, 5] = bad
    expected = r"layer '0': its inputs on the calibration data contain NaN or infinite values"
    with pytest.raises(CalibrationError, match=expected):
        pooled_gram(_inputs(nn.Sequential(nn.Linear(12, 4)), data, "0"), 4)


def test_a_sample_has_real_rows_of_every_batch() -> None:
    data = images(3, size=6)
    conv = nn.Conv2d(3, 4, 3)
    sample = sampled_inputs(_inputs(nn.Sequential(conv), data, "0"), 12, torch.Generator().manual_seed(0)).rows
    assert sample.shape == (1, 12, 27)
    for index, batch in enumerate(data):
        rows = F.unfold(batch, 3).permute(0, 2, 1).reshape(-1, 27)
        for row in sample[0, 4 * index : 4 * index + 4]:
            assert bool((rows == row).all(1).any())


def test_a_sample_of_more_rows_than_there_are_is_all_of_them() -> None:
    data = vectors(2)
    sample = sampled_inputs(_inputs(nn.Sequential(nn.Linear(12, 4)), data, "0"), 999, torch.Generator()).rows
    assert torch.equal(sample[0], torch.cat(data))


def test_an_input_that_is_no_tensor_names_the_layer() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.chunk(2, 1))

    with pytest.raises(CalibrationError, match="layer 'fc': its input is a tuple, not a tensor"):
        pooled_gram(_inputs(Outer(), vectors(1), "fc"), 2)


def test_a_layer_has_as_many_inputs_as_calls_in_all_batches() -> None:
    inputs = _inputs(TwiceNet(), vectors(3), "shared")
    assert len(inputs) == len(list(inputs)) == 6


def test_collected_inputs_are_those_of_all_calls_in_the_order_of_the_batches() -> None:
    geometry = Geometry.linear()
    mine = [[(torch.full((1, 2), 10.0 * batch + call), geometry) for call in range(2)] for batch in range(3)]
    theirs = [[(x + 0.5, geometry) for x, _ in calls] for calls in mine]
    inputs = CollectedInputs("a", mine, theirs)
    assert len(inputs) == 6
    assert [float(x[0, 0]) for x, _ in inputs] == [0, 1, 10, 11, 20, 21]
    assert [(float(x[0, 0]), float(y[0, 0])) for x, y, _ in inputs.pairs()] == [
        (value, value + 0.5) for value in (0, 1, 10, 11, 20, 21)
    ]


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_pairs_are_the_inputs_of_both_networks_in_the_order_of_the_batches() -> None:
    model, data = _Layers().eval(), vectors(3)
    reference, student = trace(copy_module(model)), trace(copy_module(model))
    student.get_submodule("first")._parameters["weight"] = nn.Parameter(2 * model.first.weight.detach())
    walk = Walk(student, [Batch((x,)) for x in data], reference)
    walk.mark_changed("first")
    node = next(node for node in walk.nodes() if node.target == "second")
    inputs = LayerInputs(walk, "second", [node.name])
    pairs = list(inputs.pairs())
    assert len(pairs) == 3 and all(geometry == Geometry.linear() for _, _, geometry in pairs)
    with torch.no_grad():
        for x, (mine, theirs, _), (alone, _) in zip(data, pairs, inputs, strict=True):
            torch.testing.assert_close(theirs, torch.tanh(model.first(x)))
            torch.testing.assert_close(mine, torch.tanh(F.linear(x, 2 * model.first.weight, model.first.bias)))
            assert torch.equal(alone, mine)


@torch.no_grad()
def test_pairs_come_batch_by_batch_and_inputs_call_by_call() -> None:
    """So that the last pairs are of other samples than the first ones."""
    graph_module, batches = trace(TwiceNet().eval()), [Batch((x,)) for x in vectors(2)]
    (layer,) = [layer for layer in find_layers(graph_module)[0] if layer.name == "shared"]
    walk = Walk(graph_module, batches, trace(TwiceNet().eval()))
    next(node for node in walk.nodes() if node.name == layer.calls[0])
    inputs = LayerInputs(walk, "shared", layer.calls)
    sums = [float(x.sum()) for x, _ in inputs]
    assert [float(mine.sum()) for mine, _, _ in inputs.pairs()] == [sums[i] for i in (0, 2, 1, 3)]


@pytest.mark.parametrize(("shapes", "is_paired"), [([(2, 3), (1, 3)], True), ([(2, 3), (2, 3)], False)])
def test_inputs_of_other_shapes_in_the_float_network_stand_for_nothing(shapes: Any, is_paired: bool) -> None:
    """It sent its samples to other experts: then the compressed network's own stand for them."""
    inputs: Any = object.__new__(LayerInputs)
    inputs._batches, inputs._calls, inputs._hidden = range(1), ["node"], None
    own, other = [(2, 3), (1, 3)], shapes

    def read(node: Any, batch: int, *, of_reference: bool = False) -> Any:
        return [(torch.full(s, float(of_reference)), "geometry") for s in (other if of_reference else own)]

    inputs._read = read
    found = [(tuple(mine.shape), float(theirs[0, 0])) for mine, theirs, _ in inputs.pairs()]
    assert found == [((2, 3), float(is_paired)), ((1, 3), float(is_paired))]


def test_hidden_inputs_are_watched_in_the_network_that_is_asked() -> None:
    weight, geometry = nn.Parameter(torch.randn(4, 3)), Geometry.linear()
    asked: list[bool] = []
    inputs: Any = object.__new__(LayerInputs)
    inputs.name, inputs._hidden, inputs._count, inputs._calls = "a", weight, None, ["node"]

    def run_ahead(node: str, batch: int, watch: Any, *, of_reference: bool) -> None:
        asked.append(of_reference)
        x = torch.full((2, 3), float(batch + 10 * of_reference))
        with watch:
            for _ in range(2):
                F.linear(x, weight)

    inputs._walk, inputs._batches = SimpleNamespace(run_ahead=run_ahead), range(3)
    assert len(inputs) == 6 and asked == [False]
    assert len(inputs) == 6 and asked == [False]  # known
    found = [(float(mine[0, 0]), float(theirs[0, 0])) for mine, theirs, _ in inputs.pairs()]
    assert found == [(b, b + 10.0) for b in (0, 0, 1, 1, 2, 2)]
    assert [(float(x[0, 0]), g) for x, g in inputs] == [(b, geometry) for b in (0, 0, 1, 1, 2, 2)]


def test_an_embeddings_inputs_are_its_columns_five_times() -> None:
    weight = torch.randn(7, 3)
    inputs = embedding_inputs("table", weight)
    ((mine, theirs, geometry),) = inputs.pairs()
    assert torch.equal(mine, torch.eye(3).repeat(5, 1)) and theirs is mine and geometry == Geometry.linear()
    torch.testing.assert_close(mine[:3] @ weight.T, weight.T)
    assert inputs.name == "table" and inputs.shared is None


def test_a_statistic_is_refused_only_if_a_value_is_not_finite() -> None:
    require_finite(torch.full((4,), 3e38), "a")  # the sum overflows
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CalibrationError, match=r"layer 'a': its inputs .* contain NaN"):
            require_finite(torch.tensor([1.0, bad]), "a")
    with pytest.raises(CalibrationError, match="layer 'a'"):
        require_finite(torch.tensor([math.inf, -math.inf]), "a")
