"""Blocks, decoding, and the unfolding of inputs against torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bgd_plugin.pq.blocks import Geometry, decode, from_blocks, sample_inputs, to_blocks, unfold_inputs

Conv: TypeAlias = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d

CONVS: dict[int, Callable[..., Conv]] = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _geometry(layer: Conv) -> Geometry:
    return Geometry.of(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def _apply(unfolded: Tensor, weight: Tensor) -> Tensor:
    """`[groups, positions, columns]` and `[C_out, ...]` -> `[positions, C_out]`."""
    matrices = weight.reshape(unfolded.shape[0], -1, unfolded.shape[2])
    return torch.einsum("gpc,goc->pgo", unfolded, matrices).flatten(1)


@st.composite
def layers(draw: st.DrawFn) -> Conv:
    """Convolutions of all dimensions, with everything that changes what they read."""
    dimensions = draw(st.integers(1, 3))

    def per_dimension(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dimensions))

    padding: str | tuple[int, ...] = (
        draw(st.sampled_from(["same", "valid"])) if draw(st.booleans()) else per_dimension(0, 2)
    )
    stride = (1,) * dimensions if padding == "same" else per_dimension(1, 3)
    groups = draw(st.integers(1, 3))
    return CONVS[dimensions](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        per_dimension(1, 3),
        stride=stride,
        padding=padding,
        dilation=per_dimension(1, 2),
        groups=groups,
        bias=False,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )


# torch warns that it pads an even kernel once more; that is its own affair.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(layer=layers(), batch=st.integers(0, 2), extra=st.tuples(*[st.integers(0, 3)] * 3))
def test_unfolded_inputs_times_the_weight_matrix_are_the_convolution(
    layer: Conv, batch: int, extra: tuple[int, int, int]
) -> None:
    sizes = [5 + more for more in extra[: len(layer.kernel_size)]]
    shape = [batch, layer.in_channels, *sizes] if batch else [layer.in_channels, *sizes]
    x = torch.randn(shape, dtype=torch.float64)
    expected = layer(x)
    expected = expected if batch else expected.unsqueeze(0)
    unfolded = unfold_inputs(x, _geometry(layer))
    torch.testing.assert_close(_apply(unfolded, layer.weight), expected.movedim(1, -1).flatten(0, -2))


@given(layer=layers(), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_sampled_inputs_are_distinct_rows_of_the_unfolded_ones(layer: Conv, count: int, seed: int) -> None:
    x = torch.randn([2, layer.in_channels, *[5] * len(layer.kernel_size)], dtype=torch.float64)
    geometry = _geometry(layer)
    unfolded, sampled = unfold_inputs(x, geometry), sample_inputs(x, geometry, count, _generator(seed))
    assert sampled.shape == (unfolded.shape[0], min(count, unfolded.shape[1]), unfolded.shape[2])
    positions = unfolded.shape[1]
    if count >= positions:
        assert torch.equal(sampled, unfolded)
    chosen = torch.randperm(positions, generator=_generator(seed))[:count].sort().values
    assert torch.equal(sampled, unfolded[:, chosen])


def test_all_positions_are_sampled_equally_often() -> None:
    x, geometry = torch.arange(12.0).view(1, 1, 12), Geometry.of((1,), 1, 0, 1, 1)
    generator = _generator()
    counts = torch.zeros(12)
    for _ in range(2000):
        counts[sample_inputs(x, geometry, 3, generator).flatten().long()] += 1
    assert counts.sum() == 6000
    assert (counts - 500).abs().max() < 100  # five standard deviations


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6)])
def test_linear_inputs_keep_their_last_dimension(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(5, 6)
    unfolded = unfold_inputs(x, Geometry.linear())
    assert unfolded.shape[0] == 1
    torch.testing.assert_close(_apply(unfolded, weight), functional.linear(x, weight).reshape(-1, 5))
    if x.numel() > 12:
        assert sample_inputs(x, Geometry.linear(), 2, _generator()).shape == (1, 2, 6)


def test_unfolding_does_not_hold_more_than_the_sampled_rows() -> None:
    x = torch.randn(1, 8, 64, 64)
    geometry = Geometry.of((3, 3), 1, 1, 1, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sample_inputs(x, geometry, 16, _generator())
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2 * x.nbytes, "the unfolded input would take nine times its bytes"


def test_an_input_that_does_not_suit_says_so() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3, 4, 5\) does not suit 2 spatial"):
        unfold_inputs(torch.zeros(1, 2, 3, 4, 5), Geometry.of((3, 3), 1, 1, 1, 1))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        unfold_inputs(torch.zeros(1, 2, 2, 9), Geometry.of((3, 3), 1, 0, 1, 1))


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 3)])
def test_same_padding_is_torchs(kernel: int, dilation: int) -> None:
    layer = torch.nn.Conv1d(1, 1, kernel, padding="same", dilation=dilation)
    after, before = layer._reversed_padding_repeated_twice[1], layer._reversed_padding_repeated_twice[0]
    assert _geometry(layer).padding == ((before, after),)


def test_a_geometry_that_torch_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="stride of 1"):
        Geometry.of((3, 3), 2, "same", 1, 1)
    with pytest.raises(ValueError, match="'full' is not"):
        Geometry.of((3, 3), 1, "full", 1, 1)
    with pytest.raises(ValueError, match="padding mode 'zero'"):
        Geometry.of((3, 3), 1, 1, 1, 1, "zero")
    with pytest.raises(ValueError, match="does not fit 2"):
        Geometry.of((3, 3), (1, 1, 1), 1, 1, 1)


@given(
    rows=st.integers(1, 5),
    tail=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    block_size=st.integers(1, 8),
)
def test_blocks_go_back_to_the_weight(rows: int, tail: list[int], block_size: int) -> None:
    weight = torch.randn(rows, *tail)
    per_row = weight[0].numel()
    if per_row % block_size:
        with pytest.raises(ValueError, match=f"{per_row} weights per row do not divide into blocks of {block_size}"):
            to_blocks(weight, block_size)
        return
    blocks = to_blocks(weight, block_size)
    assert blocks.shape == (rows, per_row // block_size, block_size)
    for row in range(rows):
        assert torch.equal(blocks[row, -1], weight[row].flatten()[-block_size:])
    assert torch.equal(from_blocks(blocks, weight.shape), weight)


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 0"):
        to_blocks(torch.zeros(2, 4), 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_codewords_gradient_is_the_sum_over_its_blocks(dtype: torch.dtype) -> None:
    codebook = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    codes = torch.randint(0, 6, (4, 2 * 5)).to(dtype)
    weight = decode(codebook, codes, (4, 6, 5))
    assert weight.shape == (4, 6, 5)
    gradient = torch.randn_like(weight)
    torch.autograd.backward(weight, gradient)
    expected = torch.zeros_like(codebook)
    blocks, gradients = to_blocks(weight.detach(), 3), to_blocks(gradient, 3)
    for row in range(4):
        for i in range(10):
            code = int(codes[row, i])
            assert torch.equal(blocks[row, i], codebook[code])
            expected[code] += gradients[row, i]
    assert codebook.grad is not None
    torch.testing.assert_close(codebook.grad, expected)
