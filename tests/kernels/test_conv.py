"""Quantized convolutions in inference: tiles, look-ups at few positions, every geometry, and torch's plain path."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from bgd_plugin import kernels
from bgd_plugin.kernels import linear, tiles
from bgd_plugin.kernels.operators import pq_decode
from bgd_plugin.nn import PQModule, pointwise, quantized
from tests.nn.test_modules import CONVS, convolutions

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_same(module: nn.Module, x: torch.Tensor, rounding: float = 1e-5) -> None:
    """The kernels and the plain path agree, in shape and in values."""
    with torch.no_grad():
        found = module(x)
        with kernels.disabled():
            expected = module(x)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.is_contiguous() and expected.is_contiguous()
    assert (found - expected).abs().max() <= rounding * expected.abs().max().clamp(min=1)


def with_codes(module: Any, size: int, codewords: int = 8, has_mask: bool = False) -> PQModule:
    blocks = module.weight[0].numel() // size
    codes = torch.randint(0, codewords, (module.weight.shape[0], blocks))
    mask = torch.rand(module.weight.shape) > 0.5 if has_mask else None
    return quantized(module, torch.randn(codewords, size).to(module.weight.dtype), codes, mask)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions())
@settings(max_examples=40)
def test_any_geometry(case: tuple[Any, list[int]]) -> None:
    module, shape = case
    assert_same(with_codes(module, 1), torch.randn(shape))
    assert_same(with_codes(module, module.weight[0].numel(), has_mask=True), torch.randn(shape))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_lie_in_memory_as_those_of_torch(form: torch.memory_format, kernel: int, batch: int) -> None:
    """So that code that views them in another shape goes on working."""
    module = nn.Conv2d(12, 16, kernel, padding=kernel // 2)
    layer, x = with_codes(module, 1), torch.randn(batch, 12, 4, 5).to(memory_format=form)
    with torch.no_grad():
        found, expected = layer(x), module(x)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (1,), (2,)])
def test_outputs_lie_as_those_of_torch_where_channels_lie_side_by_side(dimensions: int, batch: tuple[int, ...]) -> None:
    """Torch keeps this order in batches of images; of volumes only now and then, depending on threads and sizes."""
    module = CONVS[dimensions](12, 16, 1)
    layer, x = with_codes(module, 1), torch.randn(*batch, *[3] * dimensions, 12).movedim(-1, len(batch))
    with torch.no_grad():
        found, expected = layer(x), module(x)
    assert found.is_contiguous() if dimensions == 3 else found.stride() == expected.stride()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 30])
def test_many_tiles(dimensions: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of a few rows, and a remainder; with and without a batch."""
    monkeypatch.setattr(tiles, "TILE", 5 * 12 * size**dimensions)
    module = CONVS[dimensions](12, 23, min(size, 3), padding=1)
    layer = with_codes(module, module.weight[0].numel() // 4, has_mask=True)
    shape = [12, *([7] * dimensions)]
    assert_same(layer, torch.randn(2, *shape))
    assert_same(layer, torch.randn(shape))


def assert_same_with_gradients(layer: PQModule, x: torch.Tensor) -> None:
    """Who forgets `no_grad` gets the same answers bit for bit, and the plain path's gradients."""
    with torch.no_grad():
        expected = layer.eval()(x)
    found = layer(x)
    assert torch.equal(found, expected)
    wanted = [p for p in (layer.codebook, layer.bias) if p is not None]
    gradients = torch.autograd.grad(found.square().sum(), wanted)
    with kernels.disabled():
        plain = torch.autograd.grad(layer(x).square().sum(), wanted)
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("has_mask", [False, True])
def test_the_same_bits_without_no_grad(has_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution in one tile, in many, at few positions of 1×1 kernels, and in groups."""
    x = torch.randn(2, 12, 4, 4)
    for module in (nn.Conv2d(12, 23, 3, padding=1), nn.Conv2d(12, 23, 1), nn.Conv2d(12, 24, 3, groups=3, bias=False)):
        assert_same_with_gradients(with_codes(module, 4 if module.groups == 1 else 9, has_mask=has_mask), x)
    monkeypatch.setattr(tiles, "TILE", 5 * 12 * 9)
    assert_same_with_gradients(with_codes(nn.Conv2d(12, 23, 3, padding=1), 9, has_mask=has_mask), x)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1}, {"groups": 2, "bias": False}])
def test_transposed_convolutions_give_the_same_bits_without_no_grad(
    has_mask: bool, dimensions: int, options: dict[str, Any]
) -> None:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    module = kind(8, 6, 3, **options)
    columns = 8 // module.groups
    shape = (module.weight.numel() // columns, columns // 2)
    mask = torch.rand(shape[0], columns) > 0.5 if has_mask else None
    layer = quantized(module, torch.randn(16, 2), torch.randint(0, 16, shape), mask)
    assert_same_with_gradients(layer, torch.randn(2, 8, *([5] * dimensions)))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("positions", [1, 2, 7, 9])
def test_pointwise_at_few_positions(dtype: Any, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a layer is linear; at more positions it convolves."""
    calls = []
    monkeypatch.setattr(linear, "cheapest", lambda *sizes, **_: calls.append(sizes) or "tiles")
    layer = with_codes(nn.Conv2d(16, 24, 1).to(dtype), 4)
    for x in (torch.randn(1, 16, positions, positions).to(dtype), torch.randn(16, 1, positions).to(dtype)):
        calls.clear()
        assert_same(layer, x, ROUNDING[dtype])
        assert len(calls) == (x.numel() <= 64 * 16)


@pytest.mark.parametrize("positions", [9, 14])
def test_pointwise_with_channels_side_by_side(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a layer is linear at many positions, too, where that is faster; its output lies in memory as its input."""
    calls = []
    monkeypatch.setattr(pointwise, "beats_convolution", lambda *sizes: calls.append(sizes) or True)
    module = nn.Conv2d(112, 67, 1)
    layer, x = with_codes(module, 4), torch.randn(2, 112, positions, positions)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found, strides = layer(x), module(x).stride()
    assert set(calls) == {(2 * positions**2, 67, 28, 8, 4)}
    assert found.stride() == strides
    assert_same_with_gradients(layer, x)
    with kernels.disabled(), torch.no_grad():
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


def test_pointwise_with_a_mask_is_a_convolution_at_many_positions() -> None:
    layer = with_codes(nn.Conv2d(12, 16, 1), 4, has_mask=True)
    x = torch.randn(2, 12, 9, 9).to(memory_format=torch.channels_last)
    assert_same_with_gradients(layer, x)


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2), nn.ConvTranspose1d(8, 6, 3), nn.Conv2d(8, 8, 3, groups=4)],
)
def test_other_convolutions_decode_by_the_kernel(module: Any) -> None:
    columns = module.in_channels // module.groups
    area = module.weight[0, 0].numel()
    transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose1d)
    rows = module.out_channels * (area if transposed else 1)
    codes = torch.randint(0, 8, (rows, columns * (1 if transposed else area)))
    layer = quantized(module, torch.randn(8, 1), codes)
    assert_same(layer, torch.randn(2, 8, *([6] * (module.weight.ndim - 2))))


def test_memory_for_tiles_may_be_made_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_scratch", threading.local())
    layer, x = with_codes(nn.Conv2d(8, 8, 3), 3, has_mask=True), torch.randn(1, 8, 9, 9)
    with torch.inference_mode():
        layer(x)
    assert_same(layer, x)


@pytest.mark.parametrize("codewords", [16, 300, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_decoding_is_exact(codewords: int, dtype: Any) -> None:
    layer = with_codes(nn.Linear(45, 33).to(dtype), 5, codewords)
    found = pq_decode(layer.codebook, layer.codes)
    with kernels.disabled():
        assert torch.equal(found, layer.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_decoding_is_a_proper_operator() -> None:
    codebook = torch.randn(16, 3, requires_grad=True)
    codes = torch.randint(0, 16, (6, 4), dtype=torch.uint8)
    torch.library.opcheck(pq_decode, (codebook, codes))
    weights = torch.randn(6, 12)
    found = torch.autograd.grad((pq_decode(codebook, codes) * weights).sum(), codebook)[0]
    layer = quantized(nn.Linear(12, 6), codebook.detach(), codes)
    (layer.weight * weights).sum().backward()
    assert torch.allclose(found, layer.codebook.grad, rtol=1e-5, atol=1e-6)


def test_a_compiled_convolution_decodes_by_the_operator() -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    layer, x = with_codes(nn.Conv2d(8, 8, 3), 3), torch.randn(1, 8, 9, 9)
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert any("pq_decode" in target for target in targets)
