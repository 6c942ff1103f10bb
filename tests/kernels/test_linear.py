"""The kernels give what torch gives with the decoded weight, for every shape, block, width of codes, mask and type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bgd_plugin.encoding.codes import code_dtype
from bgd_plugin.kernels import lanes, linear
from bgd_plugin.kernels.lanes import FEWEST_ROWS
from bgd_plugin.kernels.linear import WAYS, lookup_linear
from bgd_plugin.kernels.permuted import can_permute
from bgd_plugin.pq.blocks import decode
from bgd_plugin.pq.masked import masked

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def layer(rows: int, blocks: int, size: int, codewords: int, dtype: Any = torch.float32) -> tuple[Tensor, Tensor]:
    """A codebook and codes, all of which a layer of this size can have."""
    codes = torch.randint(0, codewords, (rows, blocks)).to(code_dtype(codewords))
    return torch.randn(codewords, size).to(dtype), codes


def plain(x: Tensor, codebook: Tensor, codes: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """The plain path in float64, which is as good as exact here."""
    weight = masked(decode(codebook.double(), codes, (codes.shape[0], codes.shape[1] * codebook.shape[1])), mask)
    return functional.linear(x.double(), weight, None if bias is None else bias.double())


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.is_contiguous()  # as torch's own result is, and as the compiler is told
    if found.numel():
        assert (found - expected).abs().max() <= ROUNDING[found.dtype] * expected.abs().max().clamp(min=1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Inputs and a layer, of sizes that leave remainders everywhere."""
    size = draw(st.integers(1, 20) | st.sampled_from([24, 32, 33, 64, 100, 128]))
    codewords = draw(st.sampled_from([1, 2, 3, 16, 255, 256, 257, 2048, 32768, 32769]))
    rows, blocks = draw(st.integers(1, 40)), draw(st.integers(1, 21))
    dtype = draw(st.sampled_from(list(ROUNDING)))
    codebook, codes = layer(rows, blocks, size, codewords, dtype)
    mask = torch.rand(rows, blocks * size) > 0.5 if draw(st.booleans()) else None
    bias = torch.randn(rows).to(dtype) if draw(st.booleans()) else None
    lead = draw(st.sampled_from([(), (1,), (2,), (3, 1), (2, 5), (17,), (0,), (53,), (30, 9)]))
    return torch.randn(*lead, blocks * size).to(dtype), codebook, codes, mask, bias


@given(layers())
@settings(max_examples=100)
def test_a_layer_is_what_the_plain_path_computes(case: tuple[Any, ...]) -> None:
    assert_close(lookup_linear(*case), plain(*case))


def _can(way: str, codebook: Tensor, codes: Tensor, mask: Tensor | None) -> bool:
    """Whether a layer can be computed that way; the choice among the ways knows it, too."""
    if way == "permuted":
        return mask is None and can_permute(codes, codebook)
    if way == "lanes" and len(codes) < FEWEST_ROWS:
        return False
    return way not in ("table", "lanes") or (mask is None and codebook.shape[1] <= 32)


@given(layers(), st.sampled_from(sorted(WAYS)))
@settings(max_examples=100)
def test_each_way_is_what_the_plain_path_computes(case: tuple[Any, ...], way: str) -> None:
    x, codebook, codes, mask, _ = case
    x = x.reshape(-1, x.shape[-1])
    if not len(x) or not _can(way, codebook, codes, mask):
        return
    assert_close(WAYS[way](x, codebook, codes, mask), plain(x, codebook, codes, mask, None))


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("codewords", [256, 2048])
def test_many_rows_are_shared_among_threads(way: str, codewords: int, two_threads: None) -> None:
    codebook, codes = layer(1031, 515, 4, codewords)
    if not _can(way, codebook, codes, None):
        pytest.skip("not a way for this layer on this machine")
    x = torch.randn(3, 515 * 4)
    assert_close(WAYS[way](x, codebook, codes, None), plain(x, codebook, codes, None, None))


@pytest.mark.parametrize(("rows", "inputs"), [(8, 48), (4, 24), (4, 8)])
def test_many_inputs_at_once_on_other_processors(
    rows: int, inputs: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the numbers of rows and inputs that other registers have room for; many inputs are shared among threads."""
    for module in (lanes, linear):
        monkeypatch.setattr(module, "row_count", lambda: rows)
        monkeypatch.setattr(module, "widest", lambda: inputs)
    lanes.lanes_program.cache_clear()
    for count, columns in ((5, 1030), (7 * inputs + 3, 90), (9 * inputs, 1030), (2 * inputs, 10)):
        codebook, codes = layer(45, columns // 5, 5, 256)
        x = torch.randn(count, columns)
        assert_close(WAYS["lanes"](x, codebook, codes, None), plain(x, codebook, codes, None, None))
    lanes.lanes_program.cache_clear()


def test_more_weights_than_a_tile_holds() -> None:
    codebook, codes = layer(700, 512, 4, 256)
    x, mask = torch.randn(70, 2048), torch.rand(700, 2048) > 0.5
    assert_close(lookup_linear(x, codebook, codes, mask, None), plain(x, codebook, codes, mask, None))


def test_inputs_need_not_be_contiguous() -> None:
    codebook, codes = layer(12, 5, 4, 16)
    x = torch.randn(20, 6).t()
    assert_close(lookup_linear(x, codebook, codes, None, None), plain(x, codebook, codes, None, None))
    assert_close(
        lookup_linear(x, codebook.t().contiguous().t(), codes, None, None), plain(x, codebook, codes, None, None)
    )
