"""What the default method hands to the fit, and what it does with the answer: recomputed from the networks' own values.

`fit_full` itself has its oracles in `tests/pq`. Here it is watched while `quantize` calls it: its arguments must be
what the formulas give, literally, for the inputs that the layer has in the finished network and in the float one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from tests.fitting.literal import (
    NETWORKS,
    channels_of,
    close_to,
    fit_config,
    literal_of,
    quantized_network,
    rows_of,
    values_at,
)
from tests.networks import images, randomized


@pytest.mark.parametrize("step", [0.5, 0.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fit_gets_the_literal_target_and_grams(fits: list[dict[str, Any]], name: str, step: float) -> None:
    """Target, scale of the rows, centring, the cut of the held-out rows and damping, for each kind of neighbour."""
    model, result, data = quantized_network(name, asymmetric_step=step)
    literal, fit = literal_of(result, model, "2", data, step), fits[1]
    assert float((literal.x - rows_of(values_at(model, "2", data), model[2])).abs().max()) > 1e-3  # type: ignore[index]
    scaled = ("norm" in name and "bias" not in name) or name == "groups"
    target = literal.target(name != "no bias")
    close_to(fit["weight"], target * literal.scale()[:, None] if scaled else target)
    for found, expected in zip((fit["gram"], fit["heldout_gram"]), literal.grams(name != "no bias"), strict=True):
        close_to(found, expected)
    assert fit["damping"] == pytest.approx(literal.damping)
    assert fit["mask"] is None


def test_the_settings_reach_the_fit(fits: list[dict[str, Any]]) -> None:
    quantized_network("norm", rounds=3, conv=LayerConfig(block_size=18, codebook_size=4))
    assert [(f["block_size"], f["codebook_size"], f["rounds"]) for f in fits] == [(1, 4, 3), (18, 4, 3)]


@pytest.mark.parametrize("name", ["norm", "groups"])
def test_the_norm_takes_the_scale_of_the_rows_out_again(fits: list[dict[str, Any]], name: str) -> None:
    """And the report's error is that of the layer without it."""
    model, result, data = quantized_network(name, batchnorm="keep")
    literal = literal_of(result, model, "2", data)
    scale, norm = literal.scale(), model[3]  # type: ignore[index]
    found: Any = result.get_submodule("3")
    assert float(scale.max() / scale.min()) > 1.2
    close_to(found.running_var + found.eps, (norm.running_var.double() + norm.eps) * scale.square())
    close_to(found.running_mean, norm.running_mean.double() * scale)
    layer: Any = result.get_submodule("2")
    decoded = layer.weight.detach().flatten(1).double() / scale[:, None]
    lost, kept = (
        literal.x @ w.reshape(len(literal.x), -1, literal.x.shape[2]).mT
        for w in (literal.weight.double() - decoded, literal.weight.double())
    )
    report = bgd.quantize(
        model,
        data,
        fit_config(overrides=(("0", LayerConfig(block_size=1, codebook_size=4)),), batchnorm="keep"),
        progress=False,
    ).report
    assert report.layers[1].relative_error == pytest.approx(float(lost.square().sum() / kept.square().sum()), rel=1e-3)


def test_the_bias_takes_the_mean_that_the_codes_have_left() -> None:
    model, result, data = quantized_network("bias")
    literal = literal_of(result, model, "2", data)
    layer: Any = result.get_submodule("2")
    decoded = layer.weight.detach().double()
    expected = model[2].bias.double() + literal.y.mean((0, 1)) - decoded @ literal.x.mean((0, 1))  # type: ignore[index]
    close_to(layer.bias.detach(), expected.detach())
    assert float((layer.bias - model[2].bias).detach().abs().max()) > 1e-3  # type: ignore[index]


@pytest.mark.parametrize("name", ["norm", "norm and bias", "groups"])
def test_a_bias_before_a_norm_stays(name: str) -> None:
    model, result, _ = quantized_network(name)
    mine, theirs = (getattr(net.get_submodule("2"), "bias", None) for net in (result, model))
    assert (mine is None) == (theirs is None)
    assert mine is None or torch.equal(mine, theirs)


class _Block(nn.Module):
    """A quantized skip, and a branch whose last layer can make good what the skip has lost."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        width = 8 * groups
        self.skip = nn.Conv2d(3, width, 1)
        self.branch = nn.Conv2d(width, width, 1, bias=False, groups=groups)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.skip(x))
        return x + self.norm(self.branch(x))


@pytest.mark.parametrize(
    ("batchnorm", "step", "groups"),
    [("matched", 0.5, 1), ("matched", 0.5, 2), ("matched", 0.0, 1), ("reestimate", 0.5, 1)],
)
def test_the_last_layer_of_a_block_aims_at_what_the_skip_has_lost(
    fits: list[dict[str, Any]], batchnorm: Any, step: float, groups: int
) -> None:
    """Drift · gain / (gain² + 0.01 mean gain²), gain = γ / √(σ² + eps) of the float norm, on top of the outputs."""
    model, data = randomized(_Block(groups)), images(5, size=6, batch=4)
    model.norm.weight.data[3] = 1e-3  # next to no gain
    first = LayerConfig(block_size=1, codebook_size=4)
    result = bgd.quantize(
        model, data, fit_config(overrides=(("skip", first),), batchnorm=batchnorm), progress=False
    ).model
    literal = literal_of(result, model, "branch", data)
    drift = torch.sigmoid(values_at(model, "skip", data, output=True)) - torch.sigmoid(
        values_at(result, "skip", data, output=True)
    )
    gain = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach().double()
    inverse = gain / (gain.square() + 0.01 * gain.square().mean())
    lost = channels_of(drift, groups) * inverse.reshape(groups, 1, -1)
    assert float(lost.abs().max()) > 1e-2
    if batchnorm == "matched":
        literal.y = literal.y + lost
    close_to(fits[1]["weight"], literal.target() * literal.scale()[:, None])


def test_rows_of_zeros_are_scaled_like_the_mean_row(fits: list[dict[str, Any]]) -> None:
    """A dead channel's deviation is no measure of anything."""
    model = randomized(NETWORKS["norm"]())
    model[2].weight.data[5] = 0
    config = fit_config(overrides=(("0", None),), batchnorm="keep")
    result = bgd.quantize(model, images(5, size=6, batch=4), config, progress=False).model
    literal = literal_of(result, model, "2", images(5, size=6, batch=4))
    deviation = 1 / literal.scale()
    deviation[5] = 0
    deviation[5] = deviation.mean()
    norm: Any = result.get_submodule("3")
    expected = (model[3].running_var.double() + norm.eps) / deviation.square()
    close_to(norm.running_var + norm.eps, expected)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_layer_is_fitted_to_what_corrections_before_it_have_left(fits: list[dict[str, Any]], storage: Any) -> None:
    """A corrected norm, a refitted and rounded depthwise layer: all done before the next layer's turn."""
    model = randomized(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Sigmoid(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.Sigmoid(),
            nn.Conv2d(8, 16, 1),
        )
    )
    data = images(5, size=6, batch=4)
    config = fit_config(overrides=(("0", LayerConfig(block_size=1, codebook_size=2)),), weight_storage=storage)
    result = bgd.quantize(model, data, config, progress=False).model
    for path in ("1", "3", "4"):
        mine, theirs = (net.get_submodule(path).state_dict() for net in (result, model))
        assert any(not torch.equal(mine[name], theirs[name]) for name in theirs), path
    close_to(fits[1]["weight"], literal_of(result, model, "6", data).target())


class _Branching(nn.Module):
    """A convolution and its norm in a part that traces, the whole does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.part = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.Sigmoid())
        self.last = nn.Conv2d(12, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        return x if bool(x.sum() < 0) else self.last(self.part(x))


def test_without_a_graph_norms_take_scales_and_are_corrected_before_the_next_layer(fits: list[dict[str, Any]]) -> None:
    model, data = randomized(_Branching()), images(5, size=6, batch=4)
    first = LayerConfig(block_size=1, codebook_size=4)
    result = bgd.quantize(model, data, fit_config(overrides=(("first", first),)), progress=False)
    names = [layer.name for layer in result.report.layers]
    inner, outer = (literal_of(result.model, model, name, data) for name in ("part.0", "last"))
    close_to(fits[names.index("part.0")]["weight"], inner.target() * inner.scale()[:, None])
    close_to(fits[names.index("last")]["weight"], outer.target())
    mean = [values_at(net, "part.1", data, output=True).mean((0, 2, 3)) for net in (result.model, model)]
    torch.testing.assert_close(*mean, rtol=1e-3, atol=1e-4)
    assert any("batch norm (matched): 1 corrected" in note for note in result.report.notes)
