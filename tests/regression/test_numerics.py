"""What the property-based tests of `test_numerics` found, each as it was found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.quantization.datafree import quantize_weights
from tests.networks import PlainNet, SmallResNet, images, randomized, vectors


def _quantize(model: nn.Module, data: list[Tensor], **fields: Any) -> bgd.results.Quantized:
    return bgd.quantize(model, data, bgd.BGDConfig(**fields, max_divergence=None), progress=False)


def _finite(result: bgd.results.Quantized, data: list[Tensor]) -> bool:
    with torch.no_grad():
        outputs = [result.model(batch) for batch in data]
    errors = [layer.relative_error for layer in result.report.layers]
    return all(map(math.isfinite, errors)) and all(bool(torch.isfinite(o).all()) for o in outputs)


@pytest.mark.parametrize("network", [PlainNet, SmallResNet])
@pytest.mark.parametrize("kind", ["constant", "nearly constant", "large mean", "one row", "zero"])
def test_inputs_that_hardly_vary_were_not_positive_definite(network: type[nn.Module], kind: str) -> None:
    """The covariance was a difference of sums in single precision: Cholesky failed, and named no layer."""
    data = vectors() if network is PlainNet else images()
    data = {
        "constant": [torch.ones_like(x) for x in data],
        "nearly constant": [1e-8 * x for x in data],
        "large mean": [x + 1e6 for x in data],
        "one row": [data[0][:1]],
        "zero": [torch.zeros_like(x) for x in data],
    }[kind]
    assert _finite(_quantize(randomized(network()), data), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_scale_that_the_batch_norm_could_not_take_out(dtype: torch.dtype) -> None:
    """Outputs much larger than the statistics say: the variance became negative, and the network gave NaN."""
    model, data = randomized(SmallResNet()), images()
    for norm in (model.bn2, model.bn3):
        norm.running_var[::2] = 0
    model, data = model.to(dtype), [x.to(dtype) for x in data]
    assert _finite(_quantize(model, data, batchnorm="keep"), data)


@pytest.mark.parametrize("batchnorm", ["keep", "matched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e-30, 1e-38])
def test_a_layer_with_next_to_no_output(factor: float, dtype: torch.dtype, batchnorm: Any) -> None:
    """Its rows were scaled up until they, or the batch norm's statistics, overflowed."""
    model, data = randomized(SmallResNet()), [x.to(dtype) for x in images()]
    for layer in (model.conv1, model.conv2):
        layer.weight.data *= factor
    model = model.to(dtype)
    assert _finite(_quantize(model, data, batchnorm=batchnorm), data)


@pytest.mark.parametrize("method", ["full", "em"])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_weights_whose_squares_leave_single_precision(method: Any, exponent: int) -> None:
    """All distances were 0, or infinite, and all blocks got the same codeword."""
    plain, scaled = (PlainNet().eval() for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    scaled[4].weight.data *= 2.0**exponent  # the last layer: what follows does not overflow
    fields = {"method": method, "codebook_storage": "float16", "asymmetric_step": 0.0}
    one, other = (_quantize(net, vectors(), **fields).model.get_submodule("4") for net in (plain, scaled))
    assert torch.equal(one.codes, other.codes)
    without_data = [quantize_weights(net).model.get_submodule("4").codes for net in (plain, scaled)]
    assert torch.equal(*without_data)


def test_moments_that_overflow_name_the_layer() -> None:
    """The full method's went on to a factorization that failed, without a name."""
    model = PlainNet().eval()
    model[2].weight.data *= 1e20
    with pytest.raises(
        bgd.errors.CalibrationError, match=r"layer '4': its inputs .* contain NaN or infinite values, or overflow"
    ):
        _quantize(model, vectors())


def test_a_batch_norm_whose_inputs_overflow_is_named() -> None:
    """Its statistics became NaN, and no layer came after it to say so."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)).eval()
    model[1].weight.data.fill_(6e4)
    data = [x.half().abs() + 9 for x in images()]
    for config in ({"method": "em"}, {"method": "full"}):
        with pytest.raises(
            bgd.errors.CalibrationError, match=r"batch norm '2': its inputs .* contain NaN or infinite values"
        ):
            _quantize(model.half(), data, **config)


def test_errors_beyond_single_precision_are_told() -> None:
    """Their squares overflowed: the report said inf, or 0."""
    model = randomized(SmallResNet())
    model.conv1.weight.data *= 1e8
    result = _quantize(model, images(), batchnorm="keep")
    assert _finite(result, images())
    plain = PlainNet().eval()
    plain[4].weight.data *= 1e25
    assert 0 < quantize_weights(plain).report.layers[-1].relative_error < 1
