"""Which layers run on which inputs, seen at torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.calibration.watch import Watch
from bgd_plugin.pq.blocks import Geometry

Seen = list[tuple[str, Tensor, Geometry | None]]


@torch.no_grad()
def _seen(weights: dict[str, Tensor], run: Any) -> Seen:
    found: Seen = []
    with Watch(weights, lambda name, x, geometry: found.append((name, x.clone(), geometry))):
        run()
    return found


@pytest.mark.parametrize("is_biased", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_a_linear_layer(shape: tuple[int, ...], is_biased: bool) -> None:
    layer, x = nn.Linear(6, 4, bias=is_biased), torch.randn(shape)
    ((name, found, geometry),) = _seen({"a": layer.weight}, lambda: layer(x))
    assert name == "a" and geometry == Geometry.linear()
    assert torch.equal(found.reshape(-1, 6), x.reshape(-1, 6))


def test_layers_in_one_memory_are_told_apart_by_their_place() -> None:
    memory, x = torch.randn(10, 6), torch.randn(5, 6)
    parts = {"a": memory[:4], "b": memory[4:]}
    assert [name for name, *_ in _seen(parts, lambda: (F.linear(x, memory[:4]), F.linear(x, memory[4:])))] == ["a", "b"]
    assert not _seen({"b": memory[4:]}, lambda: F.linear(x, memory[:4]))
    assert not _seen({"a": memory[:4]}, lambda: F.linear(x, memory[4:]))


def test_a_product_with_one_of_several_matrices_says_which() -> None:
    weight, x = torch.randn(3, 6, 4), torch.randn(5, 6)
    found = _seen({"a": weight}, lambda: [x @ weight[member] for member in (0, 2)])
    assert [geometry for *_, geometry in found] == [Geometry.linear(0), Geometry.linear(2)]


def test_matrices_that_are_gathered_by_index_get_their_rows() -> None:
    weight, x, members = torch.randn(3, 6, 4), torch.randn(4, 2, 6), torch.tensor([2, 0, 2, 0])
    found = _seen({"a": weight}, lambda: torch.bmm(x, weight[members]))
    assert [geometry for *_, geometry in found] == [Geometry.linear(0), Geometry.linear(2)]
    assert torch.equal(found[0][1], x[[1, 3]].flatten(0, 1))
    assert torch.equal(found[1][1], x[[0, 2]].flatten(0, 1))


def test_a_gathered_copy_of_another_tensor_is_no_layer() -> None:
    weight, other, x = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.randn(2, 2, 6)
    members = torch.tensor([0, 1])
    assert not _seen({"a": weight}, lambda: (weight[members], torch.bmm(x, other[members])))


def test_grouped_products_get_the_rows_of_each_matrix_and_none_for_a_matrix_without_rows() -> None:
    x, weight = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(3, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    watch_calls: Seen = []
    watch = Watch({"a": weight}, lambda *call: watch_calls.append(call))
    watch._see_grouped_product(x, weight, ends)
    assert [geometry for *_, geometry in watch_calls] == [Geometry.linear(0), Geometry.linear(2)]
    assert torch.equal(watch_calls[0][1], x[:2]) and torch.equal(watch_calls[1][1], x[2:])
    watch._see_grouped_product(x, torch.randn(3, 16, 8, dtype=torch.bfloat16), ends)
    assert len(watch_calls) == 2


def test_a_convolution_says_how_it_moves() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    ((_, found, geometry),) = _seen({"a": conv.weight}, lambda: conv(torch.ones(1, 4, 7, 7)))
    assert found.shape == (1, 4, 7, 7)
    assert geometry == Geometry.of((3, 2), (2, 1), (1, 0), (1, 2), 2)


def test_a_transposed_convolution_reads_point_by_point() -> None:
    conv = nn.ConvTranspose2d(4, 6, 2, stride=2)
    ((_, _, geometry),) = _seen({"a": conv.weight}, lambda: conv(torch.ones(1, 4, 3, 3)))
    assert geometry is not None and geometry == Geometry.of((1, 1), (1, 1), (0, 0), (1, 1), 1)


def test_an_embedding_has_no_geometry() -> None:
    table = nn.Embedding(5, 4)
    ((name, found, geometry),) = _seen({"a": table.weight}, lambda: table(torch.tensor([3, 1])))
    assert (name, found.tolist(), geometry) == ("a", [3, 1], None)
    assert not _seen({"a": torch.ones(5, 4)}, lambda: table(torch.tensor([3])))


@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_a_recurrence_has_the_states_before_each_step(is_bidirectional: bool) -> None:
    lstm = nn.LSTM(3, 4, bidirectional=is_bidirectional)
    x, first = torch.randn(5, 2, 3), torch.randn(1 + is_bidirectional, 2, 4)
    weights = {"in": lstm.weight_ih_l0, "state": lstm.weight_hh_l0}
    if is_bidirectional:
        weights |= {"in back": lstm.weight_ih_l0_reverse, "state back": lstm.weight_hh_l0_reverse}
    outputs: list[Tensor] = []
    found = _seen(weights, lambda: outputs.append(lstm(x, (first, torch.zeros_like(first)))[0]))
    given = {name: seen.reshape(-1, seen.shape[-1]) for name, seen, _ in found}
    if set(given) != set(weights):
        pytest.skip("this torch computes an LSTM step by step")
    forward = torch.cat([first[:1], outputs[0][:-1, :, :4]]).reshape(-1, 4)
    torch.testing.assert_close(given["state"], forward)
    assert torch.equal(given["in"], x.reshape(-1, 3))
    if is_bidirectional:
        backward = torch.cat([outputs[0][1:, :, 4:], first[1:]]).reshape(-1, 4)
        torch.testing.assert_close(given["state back"], backward)


@pytest.mark.parametrize("is_fast", [True, False])
def test_attention_is_taken_apart_meanwhile(is_fast: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_fast)
    try:
        with Watch({}, lambda *_: None):
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() == is_fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
