"""Convolutions of small images without a decoded weight: every geometry, threads, gradients, and the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin import kernels
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.kernels import convolution, lanes, sliding
from bgd_plugin.kernels.conv_operator import pq_convolution
from bgd_plugin.kernels.convolution import is_faster, slide
from bgd_plugin.nn import conv as layers
from bgd_plugin.nn import quantized

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": (3, 3), "padding": 1},
    {"kernel_size": (3, 2), "padding": (1, 0), "stride": 2},
    {"kernel_size": (5, 5), "padding": 2, "stride": 2, "dilation": 2},
    {"kernel_size": (1, 1)},
    {"kernel_size": (3, 3), "padding": (0, 4), "dilation": (1, 2)},
    {"kernel_size": (7, 7), "padding": 3},
    {"kernel_size": (3, 3), "padding": 1, "stride": 3, "bias": False},
]


def case(geometry: dict[str, Any], batch: int, rows: int, channels: int, size: tuple[int, int]) -> tuple[Any, ...]:
    """A convolution, and input, codebook and codes for it."""
    module = nn.Conv2d(channels, rows, **geometry)
    columns = module.weight[0].numel()
    block = next(d for d in (9, 5, 4, 3, 2, 1) if columns % d == 0)
    codes = torch.randint(0, 256, (rows, columns // block), dtype=torch.uint8)
    return module, torch.randn(batch, channels, *size), torch.randn(256, block), codes


def shape_of(module: Any) -> Any:
    return module.kernel_size, module.stride, module.padding, module.dilation


def plain(module: Any, x: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    weight = codebook.double()[codes.long()].view(module.weight.shape)
    bias = None if module.bias is None else module.bias.detach().double()
    return functional.conv2d(x.double(), weight, bias, module.stride, module.padding, module.dilation)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.is_contiguous()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(7, 7), (1, 2), (9, 30)])
def test_it_is_what_the_plain_path_computes(geometry: dict[str, Any], size: tuple[int, int]) -> None:
    for batch, rows, channels in ((1, 16, 4), (3, 13, 6)):
        module, *own = case(geometry, batch, rows, channels, size)
        if min(s + 2 * p - d * (k - 1) for s, k, p, d in _sides(size, module)) < 1:
            continue
        with torch.no_grad():
            assert_close(slide(*own, module.bias, shape_of(module)), plain(module, *own))


def _sides(size: tuple[int, int], module: Any) -> Any:
    return zip(size, module.kernel_size, module.padding, module.dilation, strict=True)


@pytest.mark.parametrize(("rows", "inputs"), [(8, 48), (4, 24), (4, 8)])
def test_on_other_processors_and_many_threads(
    rows: int, inputs: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the numbers of rows and positions that other registers have room for."""
    for module in (lanes, convolution, sliding):
        monkeypatch.setattr(module, "row_count", lambda: rows)
        monkeypatch.setattr(module, "widest", lambda: inputs)
    sliding.sliding_program.cache_clear()
    for geometry in GEOMETRIES[:3]:
        found, *own = case(geometry, 2, 45, 40, (11, 13))
        with torch.no_grad():
            assert_close(slide(*own, found.bias, shape_of(found)), plain(found, *own))
    sliding.sliding_program.cache_clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_it_is_a_proper_operator() -> None:
    module, x, codebook, codes = case(GEOMETRIES[0], 2, 8, 4, (5, 6))
    given = x.requires_grad_(), codebook.requires_grad_(), codes, module.bias
    geometry = [list(side) for side in shape_of(module)]
    torch.library.opcheck(pq_convolution, (*given, *geometry), rtol=1e-4, atol=1e-4)
    found = pq_convolution(*given, *geometry)
    expected = plain(module, x, codebook, codes) + 0 * module.bias.double().view(-1, 1, 1)
    noise = torch.randn_like(found)
    own = torch.autograd.grad((found * noise).sum(), [x, codebook, module.bias])
    weight = codebook[codes.long()].view(module.weight.shape)
    plainly = functional.conv2d(x, weight, module.bias, padding=1)
    for one, other in zip(own, torch.autograd.grad((plainly * noise).sum(), [x, codebook, module.bias]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert_close(found, expected)


def test_a_layer_chooses_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with and without `no_grad`; masks, groups and other paddings go on by tiles."""
    calls: list[Tensor] = []
    monkeypatch.setattr(layers, "slide", lambda x, *rest: calls.append(x) or slide(x, *rest))
    module, x, codebook, codes = case(GEOMETRIES[0], 1, 256, 128, (7, 7))
    layer: Any = quantized(module, codebook, codes).eval()
    with torch.no_grad():
        found = layer(x)
        assert len(calls) == 1
        with kernels.disabled():
            assert (found - layer(x)).abs().max() <= 1e-5 * found.abs().max()
    assert torch.equal(layer(x), found)
    others = [quantized(module, codebook, codes, torch.rand(module.weight.shape) > 0.5)]
    more: list[dict[str, Any]] = [{"padding_mode": "circular"}, {"padding": "same"}, {"groups": 2}]
    for options in more:
        other = nn.Conv2d(128, 256, 3, **{"padding": 1, **options})
        others.append(quantized(other, codebook, codes[:, : other.weight[0].numel() // 9].contiguous()))
    with torch.no_grad():
        for other_layer in others:
            other_layer.eval()(x)
        layer(x.to(memory_format=torch.channels_last))
    assert len(calls) == 1


# Faster of repeated runs of the layers of ResNet-18 on one thread, on a machine with AVX-512.
@pytest.mark.parametrize(
    ("batch", "rows", "channels", "size", "kernel", "stride", "expected"),
    [
        (1, 512, 512, 7, 3, 1, True),
        (1, 512, 256, 14, 3, 2, True),
        (8, 512, 512, 7, 3, 1, False),
        (1, 128, 128, 28, 3, 1, False),
        (1, 512, 256, 14, 1, 2, False),
    ],
)
def test_it_is_chosen_for_large_weights_and_few_positions(
    batch: int, rows: int, channels: int, size: int, kernel: int, stride: int, expected: bool
) -> None:
    codebook, codes = torch.empty(256, 9), torch.empty(rows, channels, dtype=torch.uint8)
    shape: Any = (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1)
    assert is_faster(torch.empty(batch, channels, size, size), codebook, codes, shape) == expected
