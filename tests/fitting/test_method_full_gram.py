"""Method "full" through `quantize`: its error, its side effects on batch norms and biases, files and resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.correction import absorb_row_scale_
from bgd_plugin.fitting import method_full_gram
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, images, randomized, vectors

_SETTING = bgd.LayerConfig(block_size=4, codebook_size=16)


def _config(method: str, **fields: object) -> bgd.BGDConfig:
    nine = bgd.LayerConfig(block_size=9, codebook_size=16)
    return bgd.BGDConfig(
        method=method, conv=nine, pointwise_conv=_SETTING, linear=_SETTING, **fields, max_divergence=None
    )


def _correlated(count: int) -> list[Tensor]:
    mixing = torch.randn(12, 12) @ torch.diag(torch.linspace(0.05, 2, 12))
    return [torch.randn(64, 12) @ mixing for _ in range(count)]


def test_default_method() -> None:
    assert bgd.BGDConfig(max_divergence=None).method == "full"
    assert bgd.BGDConfig.paper("small").method == "em"


def test_lower_error_than_em_on_correlated_inputs() -> None:
    model, data = PlainNet().eval(), _correlated(8)
    errors = {}
    for method in ("em", "full"):
        fields = {"asymmetric_step": 0.0} if method == "full" else {}
        report = bgd.quantize(model, data, _config(method, first_layer=_SETTING, **fields), progress=False).report
        errors[method] = [layer.relative_error for layer in report.layers]
    assert all(full < em for full, em in zip(errors["full"], errors["em"], strict=True)), errors


def test_aims_at_the_float_outputs() -> None:
    """With the asymmetric target the network's output is nearer to the float one's than with the layer's own weight."""
    model, data = randomized(SmallResNet()).eval(), images(8)
    distance = {}
    for step in (0.0, 0.5):
        result = bgd.quantize(model, data, _config("full", asymmetric_step=step), progress=False)
        with torch.no_grad():
            distance[step] = sum(float((result.model(x) - model(x)).square().sum()) for x in data)
    assert distance[0.5] < distance[0.0]


@pytest.mark.parametrize("batchnorm", ["matched", "reestimate", "keep"])
def test_scaled_rows_are_taken_out_by_the_batch_norm(batchnorm: str) -> None:
    """Whatever the correction, the output stays near."""
    model, data = randomized(SmallResNet()).eval(), images(6)
    result = bgd.quantize(model, data, _config("full", batchnorm=batchnorm), progress=False)
    with torch.no_grad():
        error = (result.model(data[0]) - model(data[0])).norm() / model(data[0]).norm()
    assert error < 0.5


def test_absorbing_a_row_scale_keeps_the_output() -> None:
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) + 0.5
    x, scale = torch.randn(3, 6, 4, 4), torch.rand(6) + 0.5
    with torch.no_grad():
        before = norm(x)
        absorb_row_scale_(norm, scale)
        torch.testing.assert_close(norm(x * scale[:, None, None]), before)


def test_bias_takes_the_mean_error() -> None:
    """Without a batch norm, the mean of a layer's output on the calibration data is that of the float network."""
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32)).eval()
    data = [x + 3 for x in _correlated(4)]
    config = _config("full", asymmetric_step=0.0, kept_aside=0.0)
    result = bgd.quantize(model, data, config, progress=False)
    x = torch.cat(data)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x).mean(0), model(x).mean(0), atol=1e-3, rtol=1e-3)
    assert not torch.equal(result.model.get_submodule("1").bias, model[1].bias)


@pytest.mark.parametrize("network", [FunctionalNet, TwiceNet])
def test_other_forms_of_layers(network: type[nn.Module]) -> None:
    model = network().eval()
    data = images(3) if network is FunctionalNet else vectors(3)
    result = bgd.quantize(model, data, _config("full"), progress=False)
    with torch.no_grad():
        assert torch.isfinite(result.model(data[0])).all()


def test_grouped_and_depthwise() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
    ).eval()
    nine = bgd.LayerConfig(block_size=9, codebook_size=4)
    config = _config("full", first_layer=nine, depthwise_conv=nine)
    result = bgd.quantize(model, [torch.randn(8, 8, 6, 6)], config, progress=False)
    assert [layer.name for layer in result.report.layers] == ["0", "3", "4"]
    assert all(layer.relative_error < 1 for layer in result.report.layers)


def test_too_few_rows_for_the_gram() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    result = bgd.quantize(model, [torch.randn(3, 64)], _config("full", first_layer=_SETTING), progress=False)
    assert all(layer.relative_error < 0.7 for layer in result.report.layers)


def test_wide_layers_say_what_they_were_fitted_to() -> None:
    model = nn.Sequential(nn.Linear(8200, 8)).eval()
    config = bgd.BGDConfig(first_layer=bgd.LayerConfig(block_size=8, codebook_size=16), max_divergence=None)
    report = bgd.quantize(model, [torch.randn(4, 8200)], config, progress=False).report
    assert "pooled Gram" in report.layers[0].note


def test_same_seed_same_file_and_resumed_run_too(tmp_path: Path) -> None:
    model, data, config = randomized(SmallResNet()).eval(), images(4), _config("full")
    files = []
    for folder in (None, tmp_path / "run", tmp_path / "run"):
        result = bgd.quantize(model, data, config, checkpoint=folder, progress=False)
        bgd.save(result.model, tmp_path / "net.safetensors")
        files.append((tmp_path / "net.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    assert len(files[0]) == result.report.compressed_bytes


def test_a_shared_layer_is_fitted_to_all_its_calls() -> None:
    """The second call's inputs are of another kind; a fit to the first call's alone would not know them."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, :32]) + self.layer(x[:, 32:])

    model = Shared().eval()
    first, second = torch.randn(256, 32), torch.randn(256, 32)
    first[:, :16] = 0  # the two calls see the two halves of the columns
    second[:, 16:] = 0
    config = _config("full", first_layer=_SETTING, asymmetric_step=0.0)
    result = bgd.quantize(model, [torch.cat([first, second], dim=1)], config, progress=False)
    decoded = result.model.get_submodule("layer").weight.detach()
    weight = model.layer.weight.detach()
    halves = [float((decoded[:, h] - weight[:, h]).norm() / weight[:, h].norm()) for h in (slice(16), slice(16, 32))]
    assert max(halves) < 1.5 * min(halves), halves


def test_a_shared_batch_norm_is_left_and_named() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.two(self.norm(self.one(x)).relu()))

    model = Shared().eval()
    small = bgd.LayerConfig(block_size=4, codebook_size=2)
    config = _config("full", first_layer=small, overrides=(("two", small),))
    result = bgd.quantize(model, [torch.randn(16, 8, 4, 4)], config, progress=False)
    assert torch.equal(result.model.get_submodule("norm").running_mean, model.norm.running_mean)
    assert any(note.endswith("several places: norm") for note in result.report.notes)


def test_one_bad_value_among_very_many_is_found() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    data = torch.randn(20000, 8)
    data[17777, 3] = float("nan")
    with pytest.raises(bgd.errors.CalibrationError, match="layer '0': its inputs on the calibration data contain NaN"):
        bgd.quantize(model, [data], _config("full", first_layer=_SETTING), progress=False)


def test_notes_survive_resuming(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8200, 8)).eval()
    config = bgd.BGDConfig(first_layer=bgd.LayerConfig(block_size=8, codebook_size=16), max_divergence=None)
    data = [torch.randn(4, 8200)]
    notes = [
        bgd.quantize(model, data, config, checkpoint=tmp_path / "run", progress=False).report.layers[0].note
        for _ in range(2)
    ]
    assert "pooled Gram" in notes[0]
    assert notes[0] == notes[1]


# --- parts of the fit, literally


def test_what_the_fit_found_out_is_in_the_layers_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = method_full_gram.fit_full

    def noting(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(real(*args, **kwargs), notes=("something was found out",))

    monkeypatch.setattr(method_full_gram, "fit_full", noting)
    model, data = nn.Sequential(nn.Linear(12, 64)).eval(), vectors()
    (layer,) = bgd.quantize(model, data, _config("full", first_layer=_SETTING), progress=False).report.layers
    assert "something was found out" in layer.note


def test_a_layer_too_wide_for_its_gram_says_what_its_fit_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_full_gram, "_MAX_COLUMNS", 11)
    model, data = nn.Sequential(nn.Linear(12, 64)).eval(), vectors()
    model[0].weight.data.copy_(model[0].weight.data[:1].expand(64, 12))  # three blocks, again and again
    (layer,) = bgd.quantize(model, data, _config("full", first_layer=_SETTING), progress=False).report.layers
    assert "12 columns: too wide for a full Gram" in layer.note
    assert "13 of 16 codewords are not used" in layer.note


@pytest.mark.parametrize("batch", [0, 4])
def test_inputs_whose_squares_overflow_name_the_layer(batch: int) -> None:
    """Whether the rows are fitted or held out."""
    data = [torch.randn(20, 12) for _ in range(5)]
    data[batch] *= 1e25
    with pytest.raises(bgd.BGDError, match="layer '0'"):
        bgd.quantize(
            nn.Sequential(nn.Linear(12, 64)).eval(), data, _config("full", first_layer=_SETTING), progress=False
        )


class _Shared(nn.Module):
    """Two layers with one input, in a network that does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 24), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 1e9) else self.q(x) @ self.k(x)[:, :24].T


def test_layers_with_one_input_are_fitted_to_the_same_rows_whoever_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sample of the rows, which depends on the seed of the run and on nothing that was done before."""
    monkeypatch.setattr(method_full_gram, "_MIN_ROWS", 40)
    monkeypatch.setattr(method_full_gram, "_ROWS_PER_COLUMN", (1, 1))
    real, grams = method_full_gram.fit_full, list[Tensor]()

    def watched(weight: Tensor, gram: Tensor, *args: Any, **kwargs: Any) -> Any:
        grams.append(gram.clone())
        return real(weight, gram, *args, **kwargs)

    monkeypatch.setattr(method_full_gram, "fit_full", watched)
    model, data = _Shared().eval(), [torch.randn(60, 16) for _ in range(5)]

    def last_gram(**fields: Any) -> Tensor:
        config = _config("full", first_layer=_SETTING, kept_aside=0.0, **fields)
        bgd.quantize(model, data, config, checkpoint=tmp_path / str(fields), progress=False)
        return grams[-1]

    both = last_gram()
    (tmp_path / "{}" / "layer-0001.safetensors").unlink()  # the second layer is fitted again, the first one is not
    alone, other = last_gram(), last_gram(seed=1)
    assert len(grams) == 2 + 1 + 2
    assert torch.equal(both, alone) and not torch.equal(both, other)


def test_a_network_in_double_precision_aims_at_the_drift_of_its_skip_too() -> None:
    """The same codes and nearly the same codewords as in single precision."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.skip(x))
            return x + self.norm(self.branch(x))

    first = bgd.LayerConfig(block_size=1, codebook_size=4)
    config = _config("full", overrides=(("skip", first),), kept_aside=0.0, codebook_storage="float16")
    model = randomized(Block())
    single = bgd.quantize(model, images(5), config, progress=False).model
    double = bgd.quantize(model.double(), [x.double() for x in images(5)], config, progress=False).model
    one, other = (net.state_dict() for net in (single, double))
    assert torch.equal(one["branch.codes"], other["branch.codes"])
    torch.testing.assert_close(one["branch.codebook"].double(), other["branch.codebook"], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(one["norm.running_var"].double(), other["norm.running_var"], rtol=1e-2, atol=1e-3)
