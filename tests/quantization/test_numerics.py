"""Whatever the numbers are, a fit ends in a good result or in an error that names the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import InputSample
from bgd_plugin.fitting import output_error
from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import damped
from bgd_plugin.pq.full_gram import fit_full
from bgd_plugin.pq.gram import Moments, MomentSums
from bgd_plugin.pq.least_squares import output_objective
from bgd_plugin.pq.target_asymmetric import asymmetric_target
from bgd_plugin.quantization.datafree import quantize_weights
from tests.networks import PlainNet, SmallResNet, images, randomized, vectors
from tests.oracles import reconstruction_objective
from tests.pq.trails import watched_trails

ROWS, COLUMNS, BLOCK, CODEWORDS = 12, 8, 4, 6
seeds = st.integers(0, 2**16)


@st.composite
def grams(draw: st.DrawFn, columns: int = COLUMNS) -> Tensor:
    """Second moments `[columns, columns]` of any rank, condition and scale; channels differ much, or are dead."""
    generator = torch.Generator().manual_seed(draw(seeds))
    rank = draw(st.integers(0, columns))
    basis = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    values = torch.logspace(0, -draw(st.sampled_from([0, 6, 12, 18])), columns, dtype=torch.float64)
    values[rank:] = 0
    channels = 10.0 ** torch.tensor(draw(st.lists(st.sampled_from([0, -6, 6]), min_size=columns, max_size=columns)))
    channels *= torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 1.0]), min_size=columns, max_size=columns)))
    root = torch.linalg.qr(basis)[0] * values.sqrt() * channels.double()[:, None]
    gram: Tensor = root @ root.T * 10.0 ** draw(st.sampled_from([-60, -20, 0, 20, 60]))
    return gram


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """`[ROWS, COLUMNS]` of any size, dead rows and columns, constant, or with one number that outdoes all others."""
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    kind = draw(st.sampled_from(["random", "constant", "zero", "one", "rows", "columns", "row", "column"]))
    factor = 10.0 ** draw(st.sampled_from([-30, -6, 6, 30]))
    if kind == "constant":
        weight.fill_(draw(st.sampled_from([1.0, -3.0])))
    elif kind == "zero":
        weight.zero_()
    elif kind == "one":
        weight[3, 3] = factor
    elif kind in ("rows", "columns"):
        (weight if kind == "rows" else weight.T)[::2] = 0
    elif kind in ("row", "column"):
        (weight if kind == "row" else weight.T)[0] *= factor
    return weight * 10.0 ** draw(st.sampled_from([-30, 0, 6]))


@settings(max_examples=60)
@given(weights(), grams(), st.sampled_from([0.01, 0.2, 1.0]), st.booleans())
def test_the_full_fit_is_finite_and_no_worse_than_no_layer(
    weight: Tensor, gram: Tensor, damping: float, is_masked: bool
) -> None:
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5 if is_masked else None
    generator = torch.Generator().manual_seed(0)
    with watched_trails() as trails:
        fit = fit_full(weight, gram, None, CODEWORDS, BLOCK, damping=damping, rounds=2, mask=mask, generator=generator)
    assert torch.isfinite(fit.codebook).all()
    assert fit.codes.min() >= 0 and fit.codes.max() < CODEWORDS
    assert all(map(math.isfinite, trails[0].history))
    if mask is None:
        metric = damped(gram[None], damping)
        nothing, found = (
            output_objective(weight, codebook, codes, metric)
            for codebook, codes in ((torch.zeros(1, BLOCK), torch.zeros_like(fit.codes)), (fit.codebook, fit.codes))
        )
        assert found <= 1.001 * nothing


@settings(max_examples=60)
@given(weights(), grams(BLOCK))
def test_em_is_finite_and_no_worse_than_no_layer(weight: Tensor, gram: Tensor) -> None:
    blocks = weight.reshape(ROWS, -1, BLOCK)
    fit = fit_em(blocks, gram, CODEWORDS, 10, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(fit.codebook).all()
    found = reconstruction_objective(blocks, fit.codebook, fit.codes, gram)
    nothing = reconstruction_objective(blocks, torch.zeros(1, BLOCK), torch.zeros_like(fit.codes), gram)
    assert found <= 1.001 * nothing + 1e-30 * float(gram.trace())


@settings(max_examples=30)
@given(seeds, st.integers(-90, 90), st.integers(-190, 190))
def test_the_scale_of_weights_and_inputs_changes_no_code(seed: int, of_weight: int, of_gram: int) -> None:
    """Powers of two, so that not one bit is rounded another way: weights near 1e-30 and 1e30, Grams near 1e±57."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = (torch.randn(n, COLUMNS, generator=generator) for n in (ROWS, 30))
    gram = (inputs.T @ inputs).double()

    def fits(w: Tensor, g: Tensor) -> list[Any]:
        by_full = fit_full(w, g, g, CODEWORDS, BLOCK, generator=torch.Generator().manual_seed(1))
        blocks, metric = w.reshape(ROWS, -1, BLOCK), g[:BLOCK, :BLOCK]
        return [by_full, fit_em(blocks, metric, CODEWORDS, 10, generator=torch.Generator().manual_seed(1))]

    for plain, scaled in zip(fits(weight, gram), fits(weight * 2.0**of_weight, gram * 2.0**of_gram), strict=True):
        assert torch.equal(scaled.codes, plain.codes)
        assert torch.equal(scaled.codebook, plain.codebook * 2.0**of_weight)


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.0, 1.0, 1e3, 1e6, -1e6]), st.sampled_from([0.0, 1e-3, 1.0, 1e3]), st.integers(1, 40))
def test_moments_around_a_large_mean(seed: int, mean: float, deviation: float, count: int) -> None:
    """Against double precision from the start; the target follows the weight where the inputs say nothing."""
    generator = torch.Generator().manual_seed(seed)
    inputs = mean + deviation * torch.randn(1, count, COLUMNS, generator=generator)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    outputs = inputs @ weight.T
    sums = MomentSums()
    for start in range(0, count, 7):
        sums.add_(inputs[:, start : start + 7], outputs[:, start : start + 7])
    sums.add_(inputs[:, :0], outputs[:, :0])
    gram, _ = sums.means_().around_mean()
    exact, _ = Moments.of(inputs.double(), outputs.double()).around_mean()
    scale = float(exact.diagonal(dim1=1, dim2=2).mean()) + 1e-11 * mean**2 + 1e-30
    assert (gram - exact).abs().max() <= 1e-4 * scale
    target = asymmetric_target(weight, *Moments.of(inputs, outputs).around_mean(), step=1.0, damping=0.2)
    assert torch.isfinite(target).all()


def _scaled(target: str, exponent: int) -> Callable[[Any, list[Tensor], str], None]:
    """Weights of a layer, one of its rows or columns, what runs before it, or the data, times a power of ten."""
    factor = 10.0**exponent

    def change(model: Any, data: list[Tensor], layer: str) -> None:
        weight = model.get_submodule(layer).weight.data
        first = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))).weight.data
        parts = {"weights": weight, "row": weight[0], "column": weight[:, 0], "number": weight.view(-1)[3:4]}
        parts |= {"layer before": first, "data": torch.empty(0), "a batch": torch.empty(0), "input channel": first[0]}
        parts[target].mul_(factor)
        for index in range(len(data)) if target == "data" else [len(data) - 1] if target == "a batch" else []:
            data[index] = data[index] * factor

    return change


def _set(target: str, value: float) -> Callable[[Any, list[Tensor], str], None]:
    """All weights of a layer, half of its rows or columns, one weight, one number of one batch, or all of the data."""

    def change(model: Any, data: list[Tensor], layer: str) -> None:
        weight = model.get_submodule(layer).weight.data
        parts = {"weights": weight, "rows": weight[::2], "columns": weight[:, ::2], "number": weight.view(-1)[3:4]}
        parts |= {"datum": data[-1].view(-1)[:1], "data": torch.empty(0)}
        parts[target].fill_(value)
        for batch in data if target == "data" else []:
            batch.fill_(value)

    return change


def _norms(name: str, value: float) -> Callable[[Any, list[Tensor], str], None]:
    def change(model: Any, data: list[Tensor], layer: str) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                getattr(module, name).data[::2] = value

    return change


def _one_row(model: Any, data: list[Tensor], layer: str) -> None:
    data[:] = [data[0][:1]]


exponents = st.sampled_from([-38, -30, -12, -6, 6, 12, 30, 38])
changes = st.one_of(
    st.builds(
        _scaled,
        st.sampled_from(["weights", "row", "column", "number", "layer before", "data", "a batch", "input channel"]),
        exponents,
    ),
    st.builds(_set, st.sampled_from(["weights", "rows", "columns", "data"]), st.sampled_from([0.0, 1.0, -3.0, 1e6])),
    st.builds(_set, st.sampled_from(["number", "datum"]), st.sampled_from([math.nan, math.inf, -math.inf])),
    st.builds(_norms, st.sampled_from(["running_var", "weight"]), st.sampled_from([0.0, 1e-30, 1e30])),
    st.just(_one_row),
)
configs = st.builds(
    bgd.BGDConfig,
    method=st.sampled_from(["full", "em"]),
    codebook_storage=st.sampled_from(["int8", "float16"]),
    batchnorm=st.sampled_from(["matched", "keep", "reestimate"]),
    asymmetric_step=st.sampled_from([0.0, 0.5]),
    em_iterations=st.just(8),
    max_divergence=st.none(),
)
NETWORKS = {
    PlainNet: (vectors, ["2", "4"]),
    SmallResNet: (images, ["conv1", "conv2", "down", "fc"]),
}


@settings(max_examples=60)
@given(
    st.sampled_from([PlainNet, SmallResNet]),
    st.lists(changes, min_size=1, max_size=2),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    configs,
)
def test_a_network_is_quantized_well_or_the_layer_is_named(
    network: type[nn.Module], ills: list[Any], layer: int, dtype: torch.dtype, config: bgd.BGDConfig
) -> None:
    torch.manual_seed(0)
    make, names = NETWORKS[network]
    model, data = randomized(network()), make(3)
    for ill in ills:
        ill(model, data, names[layer % len(names)])
    model, data = model.to(dtype), [batch.to(dtype) for batch in data]
    try:
        result = bgd.quantize(model, data, config, progress=False)
    except bgd.BGDError as error:
        assert any(f"{name}'" in str(error) or f"{name}." in str(error) for name, _ in model.named_modules() if name)
        return
    errors = [report.relative_error for report in result.report.layers]
    assert all(map(math.isfinite, errors))
    if config.method == "em":  # which knows nothing of how the blocks of a row go together
        assert max(errors) <= 30
    with torch.no_grad():
        for batch in data:
            assert torch.isfinite(result.model(batch)).all() or not torch.isfinite(model(batch)).all()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_whose_squares_overflow_are_named_where_sizes_are_chosen(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    make, names = NETWORKS[network]
    model, data = randomized(network()), make(3)
    _scaled("weights", 30)(model, data, names[0])
    with pytest.raises(bgd.BGDError, match=f"layer '({'|'.join(names)})': .*overflow"):
        bgd.quantize(model, data, progress=False)


@pytest.mark.parametrize("method", ["full", "em"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_appears_midway_in_one_batch_names_the_layer_it_reaches(method: Any, bad: float) -> None:
    data = vectors()
    data[1][0, 0] = 100.0  # the only number beyond the threshold
    middle = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32))
    middle[0].weight.data.zero_()
    middle[0].bias.data.fill_(1.0)
    middle[0].weight.data[:, 0] = 1.0

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 50.0, bad, x)

    model = nn.Sequential(middle[0], Odd(), middle[1], nn.ReLU(), nn.Linear(32, 8))
    with pytest.raises(bgd.errors.CalibrationError, match="layer '2': its inputs on the calibration data contain NaN"):
        bgd.quantize(model, data, bgd.BGDConfig(method=method, max_divergence=None), progress=False)


@settings(max_examples=30)
@given(weights(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_without_data(weight: Tensor, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(COLUMNS, ROWS)).to(dtype)
    model[1].weight.data = weight.to(dtype)
    try:
        result = quantize_weights(model)
    except bgd.BGDError as error:
        assert "1.weight" in str(error) or "'1'" in str(error)
        return
    assert torch.isfinite(result.model.get_submodule("1").weight).all()
    assert max(report.relative_error for report in result.report.layers) <= 1.01


def test_the_error_of_huge_outputs_is_a_number() -> None:
    weight = torch.full((4, 8), 1e15)
    sample = InputSample(rows=torch.full((1, 3, 8), 1e15))
    assert output_error(weight, 0.5 * weight, sample) == pytest.approx(0.25)
