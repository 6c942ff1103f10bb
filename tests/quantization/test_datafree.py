"""Quantization without data, of networks and of single layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, FinetuningConfig, LayerConfig, integration
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.nn import storable
from bgd_plugin.planning.sizes import paper_bytes
from tests.networks import FunctionalNet, PlainNet, SmallResNet, images, randomized, same_outputs, vectors


def test_the_report_and_the_plan_and_the_file_agree(tmp_path: Path) -> None:
    model = randomized(SmallResNet())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = bgd.quantize_weights(model)
    written = bgd.save(result.model, tmp_path / "net")
    assert written == result.report.compressed_bytes == bgd.plan(model).compressed_bytes
    assert result.report.memory_bytes == state_bytes(result.model.state_dict()) > written
    assert result.report.paper_bytes == paper_bytes(result.model) < written
    assert [x.name for x in result.report.layers] == ["conv1", "conv2", "down", "fc"]
    assert {s.name for s in result.report.skipped} >= {"stem"}
    assert type(result.model) is SmallResNet
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=model), images())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_errors_are_those_of_the_weights() -> None:
    model = PlainNet()
    result = bgd.quantize_weights(model)
    weight = model[2].weight.detach()
    decoded = result.model.get_submodule("2").weight.detach()
    expected = float((weight - decoded).square().sum() / weight.square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-3)
    assert 0 < expected < 0.5


def test_more_codewords_lose_less() -> None:
    model = PlainNet()
    errors = [
        bgd.quantize_weights(
            model, BGDConfig(linear=LayerConfig(block_size=4, codebook_size=k), max_divergence=None)
        ).report.layers[0]
        for k in (4, 16, 32)
    ]
    assert errors[0].relative_error > errors[1].relative_error > errors[2].relative_error


def test_weights_that_code_reads_by_name_are_quantized_too() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    result = bgd.quantize_weights(model)
    assert "self_attn.in_proj_weight" in integration.placement_of(result.model)
    x = torch.randn(2, 5, 64)
    assert torch.equal(result.model(x), bgd.materialize(result.model)(x))
    assert bgd.quantize_weights(randomized(FunctionalNet())).report.layers


def test_one_layer_has_the_codes_that_it_has_in_the_network() -> None:
    model = PlainNet()
    whole = bgd.quantize_weights(model).model
    single = integration.quantize_module(model[2])
    assert torch.equal(single.codes, whole.get_submodule("2").codes)
    assert single.bias is model[2].bias


def test_one_layer_that_cannot_be_quantized_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"fc cannot be quantized: linear=None"):
        integration.quantize_module(nn.Linear(32, 32), BGDConfig(linear=None, max_divergence=None), name="fc")
    with pytest.raises(ConfigError, match="the layer cannot be quantized: already quantized"):
        integration.quantize_module(integration.quantize_module(nn.Linear(32, 32)))
    with pytest.raises(ConfigError, match="a LayerNorm has no product-quantized form"):
        integration.quantize_module(nn.LayerNorm(8))
    with pytest.raises(ConfigError, match="do not divide into blocks of 5"):
        integration.quantize_module(nn.Linear(32, 32), BGDConfig(linear=LayerConfig(block_size=5), max_divergence=None))


def test_training_needs_data() -> None:
    with pytest.raises(ConfigError, match="finetuning: training needs data"):
        bgd.quantize_weights(PlainNet(), BGDConfig(finetuning=FinetuningConfig(steps=1), max_divergence=None))


def test_values_are_needed_and_finite() -> None:
    with torch.device("meta"):
        empty = PlainNet()
    with pytest.raises(ConfigError, match="layer '2' is on the meta device"):
        bgd.quantize_weights(empty)
    broken = PlainNet()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="layer '2' contains NaN"):
        bgd.quantize_weights(broken)


def test_the_same_codes_each_time() -> None:
    model, data = PlainNet(), vectors()
    assert same_outputs(bgd.quantize_weights(model).model, bgd.quantize_weights(model).model, data)
    other = bgd.quantize_weights(model, BGDConfig(seed=1, max_divergence=None)).model
    assert not same_outputs(bgd.quantize_weights(model).model, other, data)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_come_near_their_weights(groups: int) -> None:
    """Their blocks run along the input channels: cut the other way, the decoded weight has nothing to do with it."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, 24, 3, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), layer)
    report = bgd.quantize_weights(model).report
    assert [x.name for x in report.layers] == ["1"]
    assert report.layers[0].relative_error < 0.5
    decoded = integration.quantize_module(layer).weight
    assert float((decoded - layer.weight).square().sum().detach()) < 0.5 * float(layer.weight.square().sum().detach())


def _zeros(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= torch.rand(parameter.shape) > 0.5
    return model


def test_zeros_that_are_to_stay_stay() -> None:
    model = _zeros(PlainNet())
    config = BGDConfig(preserve_zeros=True, max_divergence=None)
    result = bgd.quantize_weights(model, config).model
    found: list[Any] = [result.get_submodule("2"), integration.quantize_module(model[2], config)]
    for layer in found:
        assert torch.equal(layer.weight != 0, model[2].weight != 0)


def test_a_fit_knows_the_zeros_that_stay() -> None:
    """Weights of one value, but for the zeros: one codeword is exact."""
    model = PlainNet()
    model[2].weight.data.copy_(0.5 * (torch.rand(32, 32) > 0.5))
    config = BGDConfig(preserve_zeros=True, linear=LayerConfig(block_size=4, codebook_size=4))
    layer: Any = integration.quantize_module(model[2], config)
    torch.testing.assert_close(layer.weight, model[2].weight)


@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_codebooks_are_rounded_to_their_storage(storage: Any) -> None:
    model, config = PlainNet(), BGDConfig(codebook_storage=storage, max_divergence=None)
    for layer in (
        bgd.quantize_weights(model, config).model.get_submodule("2"),
        integration.quantize_module(model[2], config),
    ):
        codebook: Any = layer.codebook
        assert torch.equal(codebook, storable(codebook.detach(), storage))
        other = "int8" if storage == "float16" else "float16"
        assert not torch.equal(codebook, storable(codebook.detach(), other))


def test_frozen_weights_give_frozen_codebooks() -> None:
    model = PlainNet()
    model[2].weight.requires_grad_(False)
    result = bgd.quantize_weights(model).model
    flags = [result.get_submodule(name).codebook.requires_grad for name in ("2", "4")]  # type: ignore[union-attr]
    assert flags == [False, True]
    for number, flag in ((2, False), (4, True)):
        assert integration.quantize_module(model[number]).codebook.requires_grad == flag


def test_another_seed_makes_other_codes_and_iterations_make_them_better() -> None:
    model = PlainNet()

    def codes(**fields: Any) -> torch.Tensor:
        return bgd.quantize_weights(model, BGDConfig(**fields, max_divergence=None)).model.state_dict()["2.codes"]

    assert not torch.equal(codes(seed=0), codes(seed=1))
    errors = [
        bgd.quantize_weights(model, BGDConfig(em_iterations=n, max_divergence=None)).report.layers[0].relative_error
        for n in (1, 50)
    ]
    assert errors[1] < 0.98 * errors[0]


def test_a_budget_is_kept_and_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    result = bgd.quantize_weights(model, BGDConfig(target_ratio=6))
    assert 0.9 < bgd.save(result.model, tmp_path / "net") * 6 / result.report.original_bytes <= 1
    assert any(note.startswith("budget: ") for note in result.report.notes)
    assert "without data" in result.report.notes[-1]


def test_progress_of_the_choice_and_of_the_fit_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    config = BGDConfig(target_ratio=6)
    bgd.quantize_weights(model, config, progress=False)
    assert capsys.readouterr().err == ""
    bgd.quantize_weights(model, config)
    shown = capsys.readouterr().err
    assert re.search(r"estimate.* 2/2 .*quantize.* [12]/[12] ", shown, flags=re.DOTALL)


def test_pruning_masks_are_baked_in() -> None:
    model = PlainNet()
    prune.random_unstructured(model[2], "weight", amount=0.5)
    layer: Any = bgd.quantize_weights(model, BGDConfig(preserve_zeros=True, max_divergence=None)).model.get_submodule(
        "2"
    )
    assert torch.equal(layer.weight != 0, model[2].weight != 0)
    assert "weight_mask" in dict(model[2].named_buffers())


def test_weights_of_zero_have_no_error() -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32))
    model[1].weight.data.zero_()
    (layer,) = bgd.quantize_weights(model, bgd.BGDConfig(max_divergence=None)).report.layers
    assert layer.relative_error == 0.0
