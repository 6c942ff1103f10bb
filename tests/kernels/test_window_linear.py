"""The kernels of trellis windows give what a literal decoding gives: any shape, mask, type and number of inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin import kernels
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.kernels import tiles, window_decoding, window_dot, window_linear
from bgd_plugin.kernels.plain import linear_by_tiles
from bgd_plugin.kernels.window_decoding import decode_window_rows, decode_window_rows_into
from bgd_plugin.kernels.window_linear import WAYS, decoded_window_tiles, lookup_windows
from bgd_plugin.nn import quantized
from bgd_plugin.pq.forms import FORMS
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.windows import decode_windows
from tests.kernels.test_linear import ROUNDING, assert_close
from tests.kernels.window_layers import literal_weight, scale_and_codes, window_layer

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 18, 19, 40])
@pytest.mark.parametrize("columns", [1, 15, 16, 33])
def test_decoding_gives_the_bits_of_the_definition(rows: int, columns: int) -> None:
    scale, codes = scale_and_codes(rows, columns)
    assert torch.equal(decode_window_rows(scale, codes), literal_weight(scale, codes))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "columns"), [(19, 21), (64, 48)])
def test_decoding_gives_the_bits_of_the_plain_path_in_each_type(dtype: torch.dtype, rows: int, columns: int) -> None:
    scale, codes = scale_and_codes(rows, columns, dtype)
    found = decode_window_rows(scale, codes)
    assert found.dtype == dtype
    assert torch.equal(found, decode_windows(scale, codes))


def test_some_rows_are_decoded_by_themselves_and_nothing_else_is_written() -> None:
    scale, codes = scale_and_codes(22, 9)
    whole = literal_weight(scale, codes)
    for first, last in ((0, 4), (4, 22), (8, 9), (12, 19), (20, 22)):
        memory = torch.full((last - first + 2, 9), torch.nan)
        decode_window_rows_into(memory[1:-1], scale, codes, first)
        assert torch.equal(memory[1:-1], whole[first:last])
        assert bool(memory[[0, -1]].isnan().all())


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Inputs and a layer, of sizes that leave remainders everywhere."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(list(ROUNDING)))
    scale, codes = scale_and_codes(rows, columns, dtype)
    mask = torch.rand(rows, columns) > 0.5 if draw(st.booleans()) else None
    bias = torch.randn(rows).to(dtype) if draw(st.booleans()) else None
    lead = draw(st.sampled_from([(), (1,), (2,), (3, 1), (7,), (2, 4), (3, 3), (17,), (0,)]))
    return torch.randn(*lead, columns).to(dtype), scale, codes, mask, bias


def exact(x: Tensor, scale: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """In float64, which is as good as exact here."""
    weight = masked(decode_windows(scale.double(), codes), mask)
    return functional.linear(x.double(), weight, None if bias is None else bias.double())


@given(layers())
@settings(max_examples=100)
def test_a_layer_is_what_the_decoded_weight_gives(case: tuple[Any, ...]) -> None:
    assert_close(lookup_windows(*case), exact(*case))
    assert_close(linear_by_tiles(FORMS["trellis"], *case), exact(*case))


@given(layers(), st.sampled_from(sorted(WAYS)))
@settings(max_examples=100)
def test_each_way_is_what_the_decoded_weight_gives(case: tuple[Any, ...], way: str) -> None:
    x, scale, codes, mask, _ = case
    x = x.reshape(-1, x.shape[-1])[: window_dot.MOST_INPUTS]
    if len(x):
        assert_close(WAYS[way](x, scale, codes, mask), exact(x, scale, codes, mask, None))


@pytest.mark.parametrize("columns", [1, 15, 16, 112, 127, 128, 129, 144, 255, 256, 257, 300])
def test_columns_on_both_sides_of_a_chunk(columns: int) -> None:
    scale, codes = scale_and_codes(22, columns)
    assert torch.equal(decode_window_rows(scale, codes), decode_windows(scale, codes))
    mask = torch.rand(22, columns) > 0.5
    for count in range(1, window_dot.MOST_INPUTS + 1):
        x = torch.randn(count, columns)
        assert_close(WAYS["dot"](x, scale, codes, mask), exact(x, scale, codes, mask, None))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inputs_that_are_no_numbers_reach_the_outputs_that_torch_says(bad: float) -> None:
    scale, codes = scale_and_codes(22, 150)
    x = torch.randn(2, 150)
    x[1, 140] = bad
    found, wanted = WAYS["dot"](x, scale, codes, None), x @ decode_windows(scale, codes).T
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    assert_close(found[:1], wanted[:1])


@pytest.mark.parametrize("way", sorted(WAYS))
def test_many_rows_are_shared_among_threads(way: str, two_threads: None) -> None:
    scale, codes = scale_and_codes(1031, 1030)
    x = torch.randn(3, 1030)
    assert_close(WAYS[way](x, scale, codes, None), exact(x, scale, codes, None, None))


def test_tiles_are_rows_of_the_weight_in_memory_that_is_used_again() -> None:
    scale, codes = scale_and_codes(43, 10)
    mask = torch.rand(43, 10) > 0.5
    whole, seen, places = masked(literal_weight(scale, codes), mask), 0, set()
    for first, tile in decoded_window_tiles(scale, codes, mask, 10 * 6):
        assert first == seen and len(tile) <= 8
        assert torch.equal(tile, whole[first : first + len(tile)])
        seen += len(tile)
        places.add(tile.data_ptr())
    assert seen == 43 and len(places) == 1


def test_inputs_need_not_be_contiguous() -> None:
    scale, codes = scale_and_codes(12, 20)
    for x in (torch.randn(20, 6).t(), torch.randn(20, 12).t()):
        assert_close(lookup_windows(x, scale, codes, None, None), exact(x, scale, codes, None, None))


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(12, 23),
        nn.Conv1d(12, 23, 3),
        nn.Conv2d(12, 23, 3, padding=1),
        nn.Conv2d(12, 23, 1, bias=False),
        nn.Conv3d(12, 23, 1),
        nn.Conv2d(12, 24, 3, groups=3),
        nn.ConvTranspose2d(12, 23, 3),
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_of_all_kinds_agree_with_the_plain_path(
    module: nn.Module, has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without `no_grad`, bit for bit, and where a convolution takes several tiles."""
    dimensions = {"Linear": 0, "Conv1d": 1, "Conv3d": 3}.get(type(module).__name__, 2)
    x = torch.randn(2, 12, *[4] * dimensions)
    layer = _transposed(module) if isinstance(module, nn.ConvTranspose2d) else window_layer(module, has_mask)
    for tile in (tiles.TILE, 5 * 12):
        monkeypatch.setattr(tiles, "TILE", tile)
        found = layer(x)
        with torch.enable_grad():
            assert torch.equal(layer(x), found)
        with kernels.disabled():
            torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


def _transposed(module: nn.ConvTranspose2d) -> nn.Module:
    return quantized(module, *scale_and_codes(23 * 9, 12), None, "trellis").eval()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that were taken."""
    seen: list[str] = []
    for name, way in WAYS.items():
        monkeypatch.setitem(WAYS, name, lambda *given, name=name, way=way: seen.append(name) or way(*given))
    return seen


@pytest.mark.parametrize("dtype", list(ROUNDING))
@torch.no_grad()
def test_inference_uses_them_unless_they_are_turned_off(runs: list[str], dtype: torch.dtype) -> None:
    layer = window_layer(nn.Linear(32, 24).to(dtype))
    for count in (1, 8, 9):
        layer(torch.randn(count, 32, dtype=dtype))
    assert runs == ["dot", "dot", "tiles"]
    with kernels.disabled():
        layer(torch.randn(1, 32, dtype=dtype))
    layer.double()(torch.randn(1, 32, dtype=torch.float64))
    assert len(runs) == 3
    with torch.enable_grad():
        layer.to(dtype).train()(torch.randn(1, 32, dtype=dtype))
    assert len(runs) == 3


@torch.no_grad()
def test_a_decoded_weight_and_a_convolution_use_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    into = window_decoding.decode_window_rows_into
    for place in (window_decoding, window_linear):
        monkeypatch.setattr(place, "decode_window_rows_into", lambda *given: seen.append(1) or into(*given))
    layer = window_layer(nn.Conv2d(3, 24, 3))
    assert torch.equal(layer.weight, decode_windows(layer.codebook, layer.codes).view(24, 3, 3, 3))
    assert len(seen) == 1
    layer(torch.randn(1, 3, 8, 8))
    assert len(seen) == 2


@torch.no_grad()
def test_the_plain_path_holds_no_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time is the whole weight there, nor what torch needs to decode it."""
    monkeypatch.setattr("bgd_plugin.kernels.plain._TILE", 16 * 256)
    layer = window_layer(nn.Linear(256, 1024))
    x = torch.randn(2, 256)
    with kernels.disabled(), torch.profiler.profile(profile_memory=True) as profile:
        found = layer(x)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 16 * 256 * 4 <= largest <= 2 * 16 * 256 * 8 < 1024 * 256
    torch.testing.assert_close(found, functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
