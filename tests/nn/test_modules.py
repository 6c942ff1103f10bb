"""A product-quantized layer equals the float layer that holds the decoded weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bgd_plugin.nn import FloatWeight, PQModule, PQWeight, materialized, quantized

CONVS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _quantized(module: nn.Module, block_size: int = 1, codebook_size: int = 8) -> PQModule:
    """With random codewords and codes."""
    weight: Any = module.weight
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    codes = torch.randint(0, codebook_size, (rows, columns // block_size))
    return quantized(module, torch.randn(codebook_size, block_size).to(weight.dtype), codes)


def _float(module: nn.Module, layer: PQModule) -> nn.Module:
    """The float module, its weight replaced by the decoded one, written out block by block."""
    rows = [torch.cat([layer.codebook[int(code)] for code in row]) for row in layer.codes]
    module.weight = nn.Parameter(torch.stack(rows).reshape(layer.weight_shape).detach())
    return module


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, list[int]]:
    """A convolution of any geometry that torch has, and the shape of an input for it."""
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
    padding: Any = draw(st.sampled_from(["valid", "same", "numbers"]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dimensions))
    conv = CONVS[dimensions](
        4,
        draw(st.sampled_from([4, 8])),
        kernel,
        stride=stride,
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return conv, [2, 4, *(draw(st.integers(6, 8)) for _ in range(dimensions))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60)
@given(convolutions())
def test_a_convolution_equals_the_float_one_with_the_decoded_weight(case: tuple[nn.Module, list[int]]) -> None:
    module, x = case[0], torch.randn(case[1])
    layer = _quantized(module)
    assert torch.equal(layer(x), _float(module, layer)(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=20)
@given(convolutions())
def test_a_materialized_convolution_has_the_same_outputs(case: tuple[nn.Module, list[int]]) -> None:
    module, x = case[0], torch.randn(case[1])
    layer: Any = _quantized(module)
    dense = materialized(layer)
    assert type(dense) is type(module)
    assert torch.equal(dense(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_a_linear_layer_equals_the_float_one_with_the_decoded_weight(bias: bool, shape: tuple[int, ...]) -> None:
    module = nn.Linear(8, 6, bias=bias)
    layer: Any = _quantized(module, block_size=4)
    x = torch.randn(shape)
    assert torch.equal(materialized(layer)(x), layer(x))
    assert torch.equal(layer(x), _float(module, layer)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_equal_the_float_layer(dtype: torch.dtype) -> None:
    module = nn.Conv2d(4, 8, 3).to(dtype)
    layer = _quantized(module, block_size=9)
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    output = layer(x)
    assert output.dtype == dtype
    assert torch.equal(output, _float(module, layer)(x))


def test_a_subclass_becomes_the_plain_quantized_layer() -> None:
    class Named(nn.Conv2d):
        pass

    module = Named(4, 8, 3)
    layer = _quantized(module)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(layer(x), _float(module, layer)(x))


def test_a_weight_module_returns_the_decoded_weight() -> None:
    layer = _quantized(FloatWeight(nn.Parameter(torch.randn(6, 8))), block_size=4)
    assert isinstance(layer, PQWeight)
    assert torch.equal(layer(), layer.codebook[layer.codes.long()].reshape(6, 8))


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [(2, torch.uint8), (256, torch.uint8), (512, torch.int32), (65536, torch.int32)],
)
def test_codes_are_held_in_the_smallest_type(codebook_size: int, dtype: torch.dtype) -> None:
    codes = torch.tensor([[0, codebook_size - 1]])
    layer = quantized(nn.Linear(2, 1), torch.randn(codebook_size, 1), codes)
    assert layer.codes.dtype == dtype
    assert layer.codes.tolist() == codes.tolist()
    assert torch.equal(layer.weight.flatten(), layer.codebook[[0, codebook_size - 1], 0])


def test_the_state_is_codebook_codes_and_bias() -> None:
    layer = _quantized(nn.Linear(8, 6), block_size=4)
    assert set(layer.state_dict()) == {"codebook", "codes", "bias"}
    assert [name for name, _ in layer.named_parameters()] == ["codebook", "bias"]


def test_the_bias_stays_the_same_parameter() -> None:
    module = nn.Linear(8, 6)
    layer: Any = _quantized(module, block_size=4)
    assert layer.bias is module.bias
    assert materialized(layer).bias is module.bias


def test_the_gradient_of_a_codeword_is_the_sum_over_its_blocks() -> None:
    module = nn.Linear(8, 6)
    layer = _quantized(module, block_size=4, codebook_size=4)
    dense = _float(module, layer)
    x = torch.randn(5, 8)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    blocks = dense.weight.grad.reshape(6, 2, 4)
    expected = torch.stack([blocks[layer.codes == code].sum(0) for code in range(4)])
    torch.testing.assert_close(layer.codebook.grad, expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_taken_over(training: bool) -> None:
    layer: Any = _quantized(nn.Linear(8, 6).train(training))
    assert layer.training is training
    assert materialized(layer).training is training


def test_other_modules_have_no_quantized_form() -> None:
    with pytest.raises(TypeError, match="Bilinear has no product-quantized counterpart"):
        quantized(nn.Bilinear(4, 4, 4), torch.randn(2, 4), torch.zeros(3, 1))


def test_it_prints_its_geometry_and_its_blocks() -> None:
    text = repr(_quantized(nn.Conv2d(4, 8, 3, stride=2, groups=2), block_size=9))
    assert "PQConv2d(4, 8, kernel_size=(3, 3), stride=(2, 2)" in text
    assert "block_size=9, codebook_size=8" in text
    assert "PQLinear(in_features=8, out_features=6, bias=True, block_size=4" in repr(
        _quantized(nn.Linear(8, 6), block_size=4)
    )


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((4, 2), 8, dtype=torch.uint8), "layer.codes: codes range from 8 to 8, but there are 8 codewords"),
        (torch.full((4, 2), -1), "layer.codes: codes range from -1 to -1, but there are 8 codewords"),
        (torch.zeros(4, 2), "layer.codes: codes have dtype torch.float32, expected integers"),
    ],
)
def test_codes_without_a_codeword_are_not_loaded(codes: torch.Tensor, message: str) -> None:
    model = nn.ModuleDict({"layer": _quantized(nn.Linear(4, 4), block_size=2)})
    state = model.state_dict() | {"layer.codes": codes}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
