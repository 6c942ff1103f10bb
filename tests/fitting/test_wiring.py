"""What the default method hands to the fit, and what it does with the answer: recomputed from the networks' own values.

`fit_full` itself has its oracles in `tests/pq`. Here it is watched while `quantize` calls it: its arguments must be
what the formulas give, literally, for the inputs that the layer has in the finished network and in the float one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.fitting import FittedLayer, LayerContext
from bgd_plugin.fitting import method_full_gram as full_gram
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import Geometry
from bgd_plugin.support.seeds import seeded
from tests.networks import images, randomized, vectors

_SMALL = LayerConfig(block_size=4, codebook_size=8)
_NINE = LayerConfig(block_size=9, codebook_size=8)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of `fit_full`, by name."""
    real, seen = full_gram.fit_full, list[dict[str, Any]]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in bound.arguments.items()})
        return real(*args, **kwargs)

    monkeypatch.setattr(full_gram, "fit_full", watched)
    return seen


def _config(**fields: Any) -> BGDConfig:
    """Every layer small, nothing rounded after the fit, which sees all the data."""
    storage = {
        "codebook_storage": "float16",
        "weight_storage": "float32",
        "float_storage": "float32",
        "kept_aside": 0.0,
    }
    kinds = {"conv": _NINE, "pointwise_conv": _SMALL, "linear": _SMALL, "first_layer": _SMALL}
    return BGDConfig(**(kinds | storage | fields), max_divergence=None)


@torch.no_grad()
def _values(network: nn.Module, path: str, data: list[Tensor], *, output: bool = False) -> Tensor:
    """What goes into a module, or comes out of it, on all the data."""
    seen: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_hook(
        lambda _, args, out: seen.append((out if output else args[0]).double().clone())
    )
    for batch in data:
        network(batch)
    hook.remove()
    return torch.cat(seen)


def _rows(values: Tensor, layer: Any) -> Tensor:
    """Inputs of a layer as the rows that its matrix multiplies: `[groups, positions, columns]`."""
    if isinstance(layer, nn.Linear):
        return values.flatten(0, -2)[None]
    unfolded = functional.unfold(values, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return unfolded.reshape(len(values), layer.groups, -1, unfolded.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


def _channels(values: Tensor, groups: int) -> Tensor:
    """Outputs of a convolution, or a linear layer's, as `[groups, positions, rows_per_group]`."""
    flat = values.movedim(1, -1).flatten(0, -2)
    return flat.reshape(len(flat), groups, -1).transpose(0, 1)


@dataclass(kw_only=True)
class _Literal:
    """The layer's fit from its formulas, in float64; x `[groups, n, D]`, y `[groups, n, R]`."""

    weight: Tensor
    x: Tensor
    y: Tensor
    step: float = 0.5

    def moments(self, x: Tensor, centred: bool) -> Tensor:
        x = x - x.mean(1, keepdim=True) if centred else x
        return x.mT @ x / x.shape[1]

    @property
    def damping(self) -> float:
        """0.2, and as much again in proportion to the columns for each row; at most 1."""
        return min(1.0, 0.2 * (1 + self.x.shape[2] / self.x.shape[1]))

    def target(self) -> Tensor:
        """W + step · (H + damping · mean diag H · I)⁻¹ Xcᵀ (Yc − Xc Wᵀ)."""
        x, y = (values - values.mean(1, keepdim=True) for values in (self.x, self.y))
        w = self.weight.double().reshape(len(x), -1, x.shape[2])
        h = self.moments(self.x, True)
        ridge = self.damping * torch.stack([h_g.diag().mean() * torch.eye(len(h_g), dtype=h.dtype) for h_g in h])
        missing = x.mT @ (y - x @ w.mT) / x.shape[1]
        return (w + self.step * torch.linalg.solve(h + ridge, missing).mT).flatten(0, 1)

    def scale(self) -> Tensor:
        """One over the deviation of each row's outputs."""
        target = self.target().reshape(len(self.x), -1, self.x.shape[2])
        return 1 / (self.x @ target.mT).std(1, correction=0).flatten()

    def grams(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Of the first four fifths of the rows, and of the last fifth."""
        cut = 4 * self.x.shape[1] // 5
        return self.moments(self.x[:, :cut], centred), self.moments(self.x[:, cut:], centred)


def _literal(result: nn.Module, model: nn.Module, path: str, data: list[Tensor], step: float = 0.5) -> _Literal:
    """For a layer of a quantized network: the student's inputs, and what the float layer's matrix makes of its own."""
    layer: Any = model.get_submodule(path)
    mine, theirs = (_rows(_values(network, path, data), layer) for network in (result, model))
    weight = layer.weight.detach().flatten(1)
    y = theirs @ weight.double().reshape(len(theirs), -1, theirs.shape[2]).mT
    return _Literal(weight=weight, x=mine, y=y, step=step)


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.reshape(found.shape), rtol=2e-3, atol=2e-5)


# layers at "2": the layer at "0" is quantized before, so that student and float network differ there
NETWORKS: dict[str, Any] = {
    "bias": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 24)),
    "no bias": lambda: nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 24, bias=False)),
    "norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
    ),
    "norm and bias": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12)
    ),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 16, 3, groups=2, bias=False), nn.BatchNorm2d(16)
    ),
}


def _quantized(name: str, **fields: Any) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Float network, quantized one, and the data. The first layer has three inputs: blocks of its own."""
    model = randomized(NETWORKS[name]())
    data = vectors(5, batch=20) if "bias" in name and "norm" not in name else images(5, size=6, batch=4)
    first = LayerConfig(block_size=4 if isinstance(model[0], nn.Linear) else 1, codebook_size=4)
    result = bgd.quantize(model, data, _config(overrides=(("0", first),), **fields), progress=False)
    return model, result.model, data


@pytest.mark.parametrize("step", [0.5, 0.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fit_gets_the_literal_target_and_grams(fits: list[dict[str, Any]], name: str, step: float) -> None:
    """Target, scale of the rows, centring, the cut of the held-out rows and damping, for each kind of neighbour."""
    model, result, data = _quantized(name, asymmetric_step=step)
    literal, fit = _literal(result, model, "2", data, step), fits[1]
    assert float((literal.x - _rows(_values(model, "2", data), model[2])).abs().max()) > 1e-3  # type: ignore[index]
    scaled = ("norm" in name and "bias" not in name) or name == "groups"
    _close(fit["weight"], literal.target() * literal.scale()[:, None] if scaled else literal.target())
    for found, expected in zip((fit["gram"], fit["heldout_gram"]), literal.grams(name != "no bias"), strict=True):
        _close(found, expected)
    assert fit["damping"] == pytest.approx(literal.damping)
    assert fit["mask"] is None


def test_the_settings_reach_the_fit(fits: list[dict[str, Any]]) -> None:
    _quantized("norm", rounds=3, conv=LayerConfig(block_size=18, codebook_size=4))
    assert [(f["block_size"], f["codebook_size"], f["rounds"]) for f in fits] == [(1, 4, 3), (18, 4, 3)]


@pytest.mark.parametrize("name", ["norm", "groups"])
def test_the_norm_takes_the_scale_of_the_rows_out_again(fits: list[dict[str, Any]], name: str) -> None:
    """And the report's error is that of the layer without it."""
    model, result, data = _quantized(name, batchnorm="keep")
    literal = _literal(result, model, "2", data)
    scale, norm = literal.scale(), model[3]  # type: ignore[index]
    found: Any = result.get_submodule("3")
    assert float(scale.max() / scale.min()) > 1.2
    _close(found.running_var + found.eps, (norm.running_var.double() + norm.eps) * scale.square())
    _close(found.running_mean, norm.running_mean.double() * scale)
    layer: Any = result.get_submodule("2")
    decoded = layer.weight.detach().flatten(1).double() / scale[:, None]
    lost, kept = (
        literal.x @ w.reshape(len(literal.x), -1, literal.x.shape[2]).mT
        for w in (literal.weight.double() - decoded, literal.weight.double())
    )
    report = bgd.quantize(
        model,
        data,
        _config(overrides=(("0", LayerConfig(block_size=1, codebook_size=4)),), batchnorm="keep"),
        progress=False,
    ).report
    assert report.layers[1].relative_error == pytest.approx(float(lost.square().sum() / kept.square().sum()), rel=1e-3)


def test_the_bias_takes_the_mean_that_the_codes_have_left() -> None:
    model, result, data = _quantized("bias")
    literal = _literal(result, model, "2", data)
    layer: Any = result.get_submodule("2")
    decoded = layer.weight.detach().double()
    expected = model[2].bias.double() + literal.y.mean((0, 1)) - decoded @ literal.x.mean((0, 1))  # type: ignore[index]
    _close(layer.bias.detach(), expected.detach())
    assert float((layer.bias - model[2].bias).detach().abs().max()) > 1e-3  # type: ignore[index]


@pytest.mark.parametrize("name", ["norm", "norm and bias", "groups"])
def test_a_bias_before_a_norm_stays(name: str) -> None:
    model, result, _ = _quantized(name)
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
    result = bgd.quantize(model, data, _config(overrides=(("skip", first),), batchnorm=batchnorm), progress=False).model
    literal = _literal(result, model, "branch", data)
    drift = torch.sigmoid(_values(model, "skip", data, output=True)) - torch.sigmoid(
        _values(result, "skip", data, output=True)
    )
    gain = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach().double()
    inverse = gain / (gain.square() + 0.01 * gain.square().mean())
    lost = _channels(drift, groups) * inverse.reshape(groups, 1, -1)
    assert float(lost.abs().max()) > 1e-2
    if batchnorm == "matched":
        literal.y = literal.y + lost
    _close(fits[1]["weight"], literal.target() * literal.scale()[:, None])


def test_zeros_that_are_to_stay_reach_the_fit_and_the_layer(fits: list[dict[str, Any]]) -> None:
    model = randomized(NETWORKS["bias"]())
    mask = torch.rand(24, 16) > 0.4
    model[2].weight.data *= mask
    first = ("0", None)
    result = bgd.quantize(
        model, vectors(5, batch=20), _config(overrides=(first,), preserve_zeros=True), progress=False
    ).model
    assert torch.equal(fits[0]["mask"], mask)
    layer: Any = result.get_submodule("2")
    assert torch.equal(layer.weight != 0, mask)


def test_an_embedding_is_fitted_and_judged_by_the_same_metric(fits: list[dict[str, Any]]) -> None:
    """Its outputs are its weights: every column counts the same, in the fit and where the fit is judged."""
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 8)).eval()
    config = _config(embedding=_SMALL, overrides=(("1", None),))
    bgd.quantize(model, [torch.randint(0, 64, (4, 5))], config, progress=False)
    (fit,) = fits
    identity = torch.eye(16, dtype=torch.float64)
    for name in ("gram", "heldout_gram"):
        gram = fit[name].double()
        _close(gram / gram.diagonal(dim1=1, dim2=2).mean(), identity[None])
    _close(fit["weight"], model[0].weight.detach().double())


def test_few_rows_are_damped_up_to_the_mean_of_the_diagonal(fits: list[dict[str, Any]]) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    for rows, expected in ((5, 1.0), (64, 0.4), (640, 0.22)):
        bgd.quantize(model, [torch.randn(rows, 64)], _config(), progress=False)
        assert fits[-1]["damping"] == pytest.approx(expected)


def test_one_row_is_both_fitted_and_judged(fits: list[dict[str, Any]]) -> None:
    """Where nothing is left to be held out, the fit's own rows judge it."""
    bgd.quantize(nn.Sequential(nn.Linear(16, 32, bias=False)).eval(), [torch.randn(1, 16)], _config(), progress=False)
    assert torch.equal(fits[0]["gram"], fits[0]["heldout_gram"])


def test_each_layer_draws_its_own_random_numbers(fits: list[dict[str, Any]]) -> None:
    """The same whichever layers were done before, others for another layer or another seed."""
    twins = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    twins[1].load_state_dict(twins[0].state_dict())
    data = vectors(2, features=16)

    def states(**fields: Any) -> list[Tensor]:
        fits.clear()
        bgd.quantize(twins, data, _config(**fields), progress=False)
        return [fit["generator"].get_state() for fit in fits]

    both, alone, other = states(), states(overrides=(("0", None),)), states(seed=1)
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[0], other[0]) and not torch.equal(both[1], other[1])


@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_the_last_fifth_of_the_rows_is_held_out_wherever_a_batch_ends(fits: list[dict[str, Any]], batches: int) -> None:
    model, data = nn.Sequential(nn.Linear(12, 16)).eval(), vectors(batches, batch=20)
    bgd.quantize(model, data, _config(), progress=False)
    x = torch.cat(data).double()
    cut = 4 * len(x) // 5
    for name, rows in (("gram", x[:cut]), ("heldout_gram", x[cut:])):
        rows = rows - rows.mean(0)
        _close(fits[0][name], (rows.T @ rows / len(rows))[None])


def test_rows_of_zeros_are_scaled_like_the_mean_row(fits: list[dict[str, Any]]) -> None:
    """A dead channel's deviation is no measure of anything."""
    model = randomized(NETWORKS["norm"]())
    model[2].weight.data[5] = 0
    config = _config(overrides=(("0", None),), batchnorm="keep")
    result = bgd.quantize(model, images(5, size=6, batch=4), config, progress=False).model
    literal = _literal(result, model, "2", images(5, size=6, batch=4))
    deviation = 1 / literal.scale()
    deviation[5] = 0
    deviation[5] = deviation.mean()
    norm: Any = result.get_submodule("3")
    expected = (model[3].running_var.double() + norm.eps) / deviation.square()
    _close(norm.running_var + norm.eps, expected)


class _Attention(nn.Module):
    """Three layers on one and the same input, in a network that does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 32, bias=False), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        if bool(x.sum() < 0):
            return x
        return self.q(x) * self.v(x) + self.k(x)[:, :24]


def test_inputs_that_layers_share_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the same rows whichever of the layers comes first, drawn by the seed."""
    real, seen = full_gram._gathered, list[tuple[str, Tensor]]()

    def watched(context: Any, weight: Any, generator: torch.Generator) -> Any:
        seen.append((context.inputs.name, generator.get_state()))
        assert (weight is None) == (context.inputs.shared is not None)
        return real(context, weight, generator)

    monkeypatch.setattr(full_gram, "_gathered", watched)
    model = _Attention().eval()
    for seed in (0, 1, 0):
        bgd.quantize(model, vectors(5, batch=20), _config(seed=seed), progress=False)
    assert [name for name, _ in seen] == ["first", "q"] * 3 or [name for name, _ in seen] == ["q"] * 3
    first, second, third = (state for name, state in seen if name == "q")
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(first, seeded(0, "q inputs").get_state())


def test_layers_that_share_their_input_are_fitted_as_if_each_had_it_alone(fits: list[dict[str, Any]]) -> None:
    model, data = _Attention().eval(), vectors(5, batch=20)
    result = bgd.quantize(model, data, _config(), progress=False)
    names = [layer.name for layer in result.report.layers]
    assert set(names) >= {"q", "k", "v"}
    for name in ("q", "k", "v"):
        literal, fit = _literal(result.model, model, name, data), fits[names.index(name)]
        assert float((literal.x - _rows(_values(model, name, data), model.q)).abs().max()) > 1e-3
        _close(fit["weight"], literal.target())
        for found, expected in zip((fit["gram"], fit["heldout_gram"]), literal.grams(name != "k"), strict=True):
            _close(found, expected)


class _Enough(Exception):
    """What was wanted has been seen."""


@pytest.mark.parametrize(("columns", "expected"), [(64, 32768), (4096, 32768), (5000, 40000), (8192, 65536)])
def test_rows_are_sampled_by_the_number_of_columns(
    monkeypatch: pytest.MonkeyPatch, columns: int, expected: int
) -> None:
    def asked(inputs: Any, rows: int, *_: Any, **__: Any) -> Any:
        assert rows == expected
        raise _Enough

    monkeypatch.setattr(full_gram, "paired_pieces", asked)
    model = nn.Sequential(nn.Linear(columns, 8)).eval()
    with pytest.raises(_Enough):
        bgd.quantize(model, [torch.randn(2, columns)], _config(), progress=False)


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
    config = _config(overrides=(("0", LayerConfig(block_size=1, codebook_size=2)),), weight_storage=storage)
    result = bgd.quantize(model, data, config, progress=False).model
    for path in ("1", "3", "4"):
        mine, theirs = (net.get_submodule(path).state_dict() for net in (result, model))
        assert any(not torch.equal(mine[name], theirs[name]) for name in theirs), path
    _close(fits[1]["weight"], _literal(result, model, "6", data).target())


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
    result = bgd.quantize(model, data, _config(overrides=(("first", first),)), progress=False)
    names = [layer.name for layer in result.report.layers]
    inner, outer = (_literal(result.model, model, name, data) for name in ("part.0", "last"))
    _close(fits[names.index("part.0")]["weight"], inner.target() * inner.scale()[:, None])
    _close(fits[names.index("last")]["weight"], outer.target())
    mean = [_values(net, "part.1", data, output=True).mean((0, 2, 3)) for net in (result.model, model)]
    torch.testing.assert_close(*mean, rtol=1e-3, atol=1e-4)
    assert any("batch norm (matched): 1 corrected" in note for note in result.report.notes)


def test_samples_that_are_kept_aside_are_not_fitted_to(fits: list[dict[str, Any]]) -> None:
    model, data = nn.Sequential(nn.Linear(12, 16)).eval(), vectors(5, batch=20)
    bgd.quantize(model, data, _config(kept_aside=0.2), progress=False)
    aside = {int((place + 0.5) * 5) for place in range(20)}
    x = torch.cat(data).double()[[i for i in range(100) if i not in aside]]
    cut = 64  # four fifths of 80
    for name, rows in (("gram", x[:cut]), ("heldout_gram", x[cut:])):
        rows = rows - rows.mean(0)
        _close(fits[0][name], (rows.T @ rows / len(rows))[None])


@pytest.mark.parametrize("method", ["em", "full"])
def test_zeros_that_stay_do_not_pull_at_the_codewords(method: Any) -> None:
    """Weights of one value, but for the zeros: a codeword of that value is exact wherever the zeros are."""
    model = nn.Sequential(nn.Linear(16, 64, bias=False)).eval()
    model[0].weight.data.copy_(0.5 * (torch.rand(64, 16) > 0.5))
    config = _config(method=method, preserve_zeros=True, asymmetric_step=0.0)
    report = bgd.quantize(model, vectors(3, features=16), config, progress=False).report
    assert report.layers[0].relative_error < 1e-6


def test_inputs_whose_squares_overflow_name_the_layer() -> None:
    model, data = nn.Sequential(nn.Linear(12, 64)).eval(), [1e25 * x for x in vectors(2)]
    with pytest.raises(bgd.BGDError, match=r"layer '0': its inputs on the calibration data contain .* or overflow"):
        bgd.quantize(model, data, _config(), progress=False)


@pytest.mark.parametrize("has_norm", [False, True])
def test_the_bias_of_an_exact_layer_makes_good_what_its_inputs_have_lost(has_norm: bool) -> None:
    """Unless a norm does. Every batch is the same, so that what helps on one does on all."""
    after = nn.BatchNorm1d(24) if has_norm else nn.Identity()
    model = randomized(nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 24), after))
    data = 5 * vectors(1, batch=50)
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.sign())
    first = LayerConfig(block_size=4, codebook_size=2)
    config = _config(overrides=(("0", first),), linear=LayerConfig(block_size=4, codebook_size=16))
    result = bgd.quantize(model, data, config, progress=False).model
    assert torch.equal(result.get_submodule("2").weight, model[2].weight)
    with torch.no_grad():
        found, exact = (torch.cat([net(x) for x in data]).double().mean(0) for net in (result, model))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.get_submodule("2").bias, model[2].bias) == has_norm  # type: ignore[arg-type]


@pytest.mark.parametrize(("has_norm", "has_bias"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_stream_is_fitted_to_the_literal_target_and_gram(
    has_norm: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all rows, held-out ones among them, since a stream is fitted once and not judged."""
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
    weight, theirs = torch.randn(24, 16), [torch.randn(20, 16) + 1 for _ in range(5)]
    weight[5] *= 0.05  # a quiet row has a scale of its own
    mine = [x + 0.3 * torch.randn(20, 16) + 0.2 for x in theirs]
    inputs = CollectedInputs("a", *([[(x, Geometry.linear())] for x in values] for values in (mine, theirs)))
    context = LayerContext(
        layer=layer, weight=weight, inputs=inputs, has_batchnorm=has_norm, has_bias=has_bias, config=BGDConfig()
    )
    generator = torch.Generator().manual_seed(0)
    found = full_gram.FULL.solve(context, full_gram.FULL.collect(context, generator), generator)
    x = torch.cat(mine).double()[None]
    literal = _Literal(weight=weight, x=x, y=torch.cat(theirs).double()[None] @ weight.double().T)
    ((rows, gram, planned, damping),) = seen
    scaled = has_norm and not has_bias
    _close(rows, literal.target() * literal.scale()[:, None] if scaled else literal.target())
    _close(gram, literal.moments(x, has_norm or has_bias))
    assert planned is layer and damping == pytest.approx(literal.damping)
    if scaled:
        assert found.row_scale is not None
        _close(found.row_scale, literal.scale())
    else:
        assert found.row_scale is None
    if has_bias and not has_norm:
        decoded = fit.codebook[fit.codes].reshape(24, 16).double()
        assert found.bias_shift is not None
        _close(found.bias_shift, literal.y.mean((0, 1)) - decoded @ x.mean((0, 1)))
    else:
        assert found.bias_shift is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [8, 256])
def test_the_codebook_has_the_type_of_the_weight(dtype: torch.dtype, size: int) -> None:
    """Whether the layer is fitted, or exact."""
    model = nn.Sequential(nn.Linear(12, 64)).to(dtype).eval()
    first = LayerConfig(block_size=1 if size > 8 else 4, codebook_size=size)
    result = bgd.quantize(model, [x.to(dtype) for x in vectors()], _config(first_layer=first), progress=False)
    assert result.model.get_submodule("0").codebook.dtype == dtype
