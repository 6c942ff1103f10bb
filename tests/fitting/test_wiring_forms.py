"""What reaches the fit of layers in other forms: with zeros, exact, as a stream, an embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.fitting import FittedLayer, LayerContext
from bgd_plugin.fitting import method_full_gram as full_gram
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import Geometry
from tests.fitting.literal import (
    NETWORKS,
    SMALL,
    Literal,
    close_to,
    fit_config,
)
from tests.networks import randomized, vectors


def test_zeros_that_are_to_stay_reach_the_fit_and_the_layer(fits: list[dict[str, Any]]) -> None:
    model = randomized(NETWORKS["bias"]())
    mask = torch.rand(24, 16) > 0.4
    model[2].weight.data *= mask
    first = ("0", None)
    result = bgd.quantize(
        model, vectors(5, batch=20), fit_config(overrides=(first,), preserve_zeros=True), progress=False
    ).model
    assert torch.equal(fits[0]["mask"], mask)
    layer: Any = result.get_submodule("2")
    assert torch.equal(layer.weight != 0, mask)


def test_an_embedding_is_fitted_and_judged_by_the_same_metric(fits: list[dict[str, Any]]) -> None:
    """Its outputs are its weights: every column counts the same, in the fit and where the fit is judged."""
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 8)).eval()
    config = fit_config(embedding=SMALL, overrides=(("1", None),))
    bgd.quantize(model, [torch.randint(0, 64, (4, 5))], config, progress=False)
    (fit,) = fits
    identity = torch.eye(16, dtype=torch.float64)
    for name in ("gram", "heldout_gram"):
        gram = fit[name].double()
        close_to(gram / gram.diagonal(dim1=1, dim2=2).mean(), identity[None])
    close_to(fit["weight"], model[0].weight.detach().double())


@pytest.mark.parametrize("method", ["em", "full"])
def test_zeros_that_stay_do_not_pull_at_the_codewords(method: Any) -> None:
    """Weights of one value, but for the zeros: a codeword of that value is exact wherever the zeros are."""
    model = nn.Sequential(nn.Linear(16, 64, bias=False)).eval()
    model[0].weight.data.copy_(0.5 * (torch.rand(64, 16) > 0.5))
    config = fit_config(method=method, preserve_zeros=True, asymmetric_step=0.0)
    report = bgd.quantize(model, vectors(3, features=16), config, progress=False).report
    assert report.layers[0].relative_error < 1e-6


@pytest.mark.parametrize("has_norm", [False, True])
def test_the_bias_of_an_exact_layer_makes_good_what_its_inputs_have_lost(has_norm: bool) -> None:
    """Unless a norm does. Every batch is the same, so that what helps on one does on all."""
    after = nn.BatchNorm1d(24) if has_norm else nn.Identity()
    model = randomized(nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 24), after))
    data = 5 * vectors(1, batch=50)
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.sign())
    first = LayerConfig(block_size=4, codebook_size=2)
    config = fit_config(overrides=(("0", first),), linear=LayerConfig(block_size=4, codebook_size=16))
    result = bgd.quantize(model, data, config, progress=False).model
    assert torch.equal(result.get_submodule("2").weight, model[2].weight)
    with torch.no_grad():
        found, exact = (torch.cat([net(x) for x in data]).double().mean(0) for net in (result, model))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.get_submodule("2").bias, model[2].bias) == has_norm  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [100, 30])
@pytest.mark.parametrize(("has_norm", "has_bias"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_stream_is_fitted_to_the_literal_target_and_gram(
    has_norm: bool, has_bias: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all rows, held-out ones among them, since a stream is fitted once; with few rows these limit the step."""
    seen: list[Any] = []
    fit = FittedLayer(codebook=torch.randn(8, 1), codes=torch.randint(0, 8, (24, 16)))

    def watched(rows: Tensor, gram: Tensor, layer: PlannedLayer, *, damping: float) -> FittedLayer:
        seen.append((rows.clone(), gram.clone(), layer, damping))
        return fit

    monkeypatch.setattr(full_gram, "fit_stream", watched)
    layer = PlannedLayer(
        name="a",
        target="a",
        kind="linear",
        family="linear",
        weight_shape=(24, 16),
        block_size=1,
        codebook_size=256,
        calls=(),
        codes="entropy",
        size_bytes=300,
    )
    weight, theirs = torch.randn(24, 16), [torch.randn(count // 5, 16) + 1 for _ in range(5)]
    weight[5] *= 0.05  # a quiet row has a scale of its own
    mine = [x + 0.3 * torch.randn_like(x) + 0.2 for x in theirs]
    inputs = CollectedInputs("a", *([[(x, Geometry.linear())] for x in values] for values in (mine, theirs)))
    context = LayerContext(
        layer=layer, weight=weight, inputs=inputs, has_batchnorm=has_norm, has_bias=has_bias, config=BGDConfig()
    )
    generator = torch.Generator().manual_seed(0)
    found = full_gram.FULL.solve(context, full_gram.FULL.collect(context, generator), generator)
    x = torch.cat(mine).double()[None]
    literal = Literal(weight=weight, x=x, y=torch.cat(theirs).double()[None] @ weight.double().T)
    ((rows, gram, planned, damping),) = seen
    if count < 2 * 16:
        literal.step = min(literal.step, literal.best_step(has_norm or has_bias))
        assert 0 < literal.step < 0.5 or not (has_norm or has_bias)
    scaled = has_norm and not has_bias
    target = literal.target(has_norm or has_bias)
    close_to(rows, target * literal.scale()[:, None] if scaled else target)
    close_to(gram, literal.moments(x, has_norm or has_bias))
    assert planned is layer and damping == pytest.approx(literal.damping)
    if scaled:
        assert found.row_scale is not None
        close_to(found.row_scale, literal.scale())
    else:
        assert found.row_scale is None
    if has_bias and not has_norm:
        decoded = fit.codebook[fit.codes].reshape(24, 16).double()
        assert found.bias_shift is not None
        close_to(found.bias_shift, literal.y.mean((0, 1)) - decoded @ x.mean((0, 1)))
    else:
        assert found.bias_shift is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [8, 256])
def test_the_codebook_has_the_type_of_the_weight(dtype: torch.dtype, size: int) -> None:
    """Whether the layer is fitted, or exact."""
    model = nn.Sequential(nn.Linear(12, 64)).to(dtype).eval()
    first = LayerConfig(block_size=1 if size > 8 else 4, codebook_size=size)
    result = bgd.quantize(model, [x.to(dtype) for x in vectors()], fit_config(first_layer=first), progress=False)
    assert result.model.get_submodule("0").codebook.dtype == dtype


def test_the_bias_of_an_exact_convolution_makes_good_the_shift_of_its_inputs() -> None:
    """Weights of ±1 are exact; each input is half too large, so each output is by half the sum of its row."""
    torch.manual_seed(0)
    weight, theirs = torch.randn(6, 2, 3).sign(), [torch.randn(8, 2, 10) for _ in range(5)]
    geometry = Geometry.of((3,), 1, 0, 1, 1)
    inputs = CollectedInputs("a", *([[(x + shift, geometry)] for x in theirs] for shift in (0.5, 0.0)))
    layer = PlannedLayer(
        name="a",
        target="a",
        kind="conv1d",
        family="conv",
        weight_shape=(6, 2, 3),
        block_size=1,
        codebook_size=4,
        calls=(),
    )
    context = LayerContext(
        layer=layer, weight=weight, inputs=inputs, has_batchnorm=False, has_bias=True, config=BGDConfig()
    )
    generator = torch.Generator().manual_seed(0)
    found = full_gram.FULL.solve(context, full_gram.FULL.collect(context, generator), generator)
    assert torch.equal(found.decoded(weight.shape), weight)
    assert found.bias_shift is not None
    torch.testing.assert_close(found.bias_shift, -0.5 * weight.sum((1, 2)), rtol=1e-4, atol=1e-4)
