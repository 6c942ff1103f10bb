"""Products looked up in bytes: as exact as float32, for every size that they are offered for, else not offered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bgd_plugin.jit import threads
from bgd_plugin.kernels import linear, permuted
from bgd_plugin.kernels.linear import WAYS, lookup_linear
from bgd_plugin.kernels.permuted import can_permute, permuted_outputs
from tests.kernels.test_linear import layer, plain

_ROWS = 128
needs_instructions = pytest.mark.skipif(
    not can_permute(torch.zeros(_ROWS, 64, dtype=torch.uint8), torch.zeros(256, 4)),
    reason="the processor does not look up bytes",
)


def outputs(x: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """What the kernel writes; NaN where it writes nothing."""
    output = torch.full((len(codes),), float("nan"))
    done = permuted_outputs(x, codebook, codes, output)
    assert output[done:].isnan().all()
    return output[:done]


def literal(x: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """The definition, product by product, in float64."""
    size = codebook.shape[1]
    result = torch.zeros(len(codes), dtype=torch.float64)
    for i in range(codes.shape[1]):
        block = x[i * size : (i + 1) * size].double()
        for r in range(len(codes)):
            result[r] += block @ codebook[int(codes[r, i])].double()
    return result


@needs_instructions
def test_it_is_the_sum_of_products() -> None:
    codebook, codes = layer(_ROWS, 67, 3, 200)
    x = torch.randn(67 * 3)
    expected = literal(x, codebook, codes)
    assert (outputs(x, codebook, codes) - expected).abs().max() <= 2e-6 * expected.abs().max()


@needs_instructions
@given(
    st.integers(128, 700),
    st.integers(64, 300),
    st.integers(1, 16),
    st.sampled_from([1, 2, 63, 64, 65, 128, 255, 256]),
    st.sampled_from([1.0, 1e-6, 1e12]),
)
@settings(max_examples=40)
def test_sizes_and_scales(rows: int, blocks: int, size: int, codewords: int, scale: float) -> None:
    codebook, codes = layer(rows, blocks, size, codewords)
    x = torch.randn(blocks * size) * scale
    found = outputs(x, codebook, codes)
    assert len(found) == rows // _ROWS * _ROWS
    expected = plain(x[None], codebook, codes, None, None)[0, : len(found)]
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@needs_instructions
@pytest.mark.parametrize(("rows", "blocks"), [(128 * 9, 70), (128 * 5, 1024), (128 * 3, 4096), (128 * 6, 2050)])
def test_rows_of_several_passes(rows: int, blocks: int) -> None:
    """The last pass has fewer rows, and long rows have passes of fewer rows."""
    codebook, codes = layer(rows, blocks, 2, 256)
    x, bias = torch.randn(1, blocks * 2), torch.randn(rows)
    expected = plain(x, codebook, codes, None, bias)
    found = linear._by_permutations(x, codebook, codes, None, bias)
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@needs_instructions
@pytest.mark.parametrize("is_forked", [False, True])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, count: int, is_forked: bool) -> None:
    """A part's tables and rows are its own, and there may be more parts than chunks."""
    codebook, codes = layer(128 * 11, 130, 4, 256)
    x, bias, before = torch.randn(520), torch.randn(128 * 11), torch.get_num_threads()
    x[7], found = 1.0, []
    monkeypatch.setattr(threads, "_is_forked", is_forked)
    for own in (1, count):
        torch.set_num_threads(own)
        try:
            found.append(torch.empty(128 * 11))
            assert permuted_outputs(x, codebook, codes, found[-1], bias) == len(codes)
            x[7] = float("inf")
            assert not permuted_outputs(x, codebook, codes, torch.empty(128 * 11), bias)
            x[7] = 1.0
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_instructions
@pytest.mark.parametrize("where", [0, 64, 130])
def test_one_block_may_be_much_larger_than_the_others(where: int) -> None:
    """Each group of positions has a scale of its own, and largest entries must not wrap around."""
    codebook, codes = layer(256, 131, 4, 256)
    x = torch.randn(131 * 4)
    x[4 * where : 4 * where + 4] *= 1e4
    expected = plain(x[None], codebook, codes, None, None)[0]
    assert (outputs(x, codebook, codes) - expected).abs().max() <= 2e-6 * expected.abs().max()


@needs_instructions
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-37])
@pytest.mark.parametrize("column", [0, 259, 399])
def test_what_fixed_point_cannot_hold_is_left_to_the_dot_products(value: float, column: int) -> None:
    codebook, codes = layer(256, 100, 4, 256)
    x = torch.zeros(1, 400)
    x[0, column] = value
    assert not len(outputs(x[0], codebook, codes))
    found, expected = (WAYS[way](x, codebook, codes, None) for way in ("permuted", "dot"))
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@needs_instructions
def test_an_input_of_zeros_gives_zeros() -> None:
    codebook, codes = layer(256, 100, 4, 256)
    assert not WAYS["permuted"](torch.zeros(1, 400), codebook, codes, None).any()


@needs_instructions
def test_rows_left_over_are_computed_by_dot_products() -> None:
    codebook, codes = layer(_ROWS + 5, 80, 4, 256)
    x = torch.randn(2, 320)
    found, expected = (WAYS[way](x, codebook, codes, None) for way in ("permuted", "dot"))
    assert torch.equal(found[:, _ROWS:], expected[:, _ROWS:])
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@needs_instructions
def test_a_large_layer_is_computed_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, codes = layer(4096, 256, 8, 256)
    x, seen = torch.randn(1, 2048), []

    def watched(*arguments: Any) -> int:
        seen.append(permuted_outputs(*arguments))
        return seen[-1]

    monkeypatch.setattr(linear, "permuted_outputs", watched)
    lookup_linear(x, codebook, codes, None, None)
    assert seen == [4096]


@pytest.mark.parametrize(
    ("rows", "blocks", "size", "codewords"),
    [(127, 64, 4, 256), (128, 63, 4, 256), (128, 64, 17, 256), (128, 64, 4, 257)],
)
def test_sizes_that_do_not_suit_are_refused(rows: int, blocks: int, size: int, codewords: int) -> None:
    codebook, codes = layer(rows, blocks, size, codewords)
    assert not can_permute(codes, codebook)


def test_a_processor_without_the_instructions_uses_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permuted, "_has_instructions", lambda: False)
    monkeypatch.setattr(linear, "permuted_outputs", lambda *_: pytest.fail("needs instructions that are missing"))
    codebook, codes = layer(4096, 256, 8, 256)
    x = torch.randn(1, 2048)
    assert torch.equal(lookup_linear(x, codebook, codes, None, None), WAYS["dot"](x, codebook, codes, None))
