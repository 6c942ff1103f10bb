"""Hugging Face transformers: quantized with data and without, saved, loaded elsewhere; against the core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, FinetuningConfig, LayerConfig, integration
from bgd_plugin.errors import ConfigError
from bgd_plugin.training import kl_to_teacher
from tests.adapters.entrances import same_state

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

adapter: Any = bgd.load_adapter("transformers")

import transformers  # noqa: E402
from transformers import AutoModel, AutoModelForImageClassification  # noqa: E402

from tests.adapters.transformers.small import (  # noqa: E402
    MODELS,
    batches,
    bert,
    folder,
    in_a_fresh_process,
    llama,
    resnet,
    same_logits,
    vit,
)

__all__ = ["folder"]

SMALL: dict[str, Any] = {
    "max_divergence": None,
    "conv": LayerConfig(block_size=9, codebook_size=32),
    "linear": LayerConfig(block_size=4, codebook_size=16),
    "codebook_storage": "float16",
    "weight_storage": "float16",
}


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_gives_the_cores_codes_and_outputs(name: str) -> None:
    model = MODELS[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = bgd.quantize(model, batches(model), BGDConfig(**SMALL), progress=False)
    config = adapter.BGDQuantizationConfig(**SMALL)
    result = adapter.quantize_pretrained(model, batches(model), config, progress=False)
    assert type(result.model) is type(model)
    assert same_state(result.model, expected.model)
    assert same_logits(result.model, expected.model)
    assert not same_logits(result.model, model)
    assert result.report.compressed_bytes == expected.report.compressed_bytes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    result = adapter.quantize_pretrained(model, batches(model), adapter.BGDQuantizationConfig(**SMALL), progress=False)
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_state(result.model, loaded)
    assert same_logits(result.model, loaded)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.3 * result.report.compressed_bytes
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert same_state(loaded, again)


def test_loaded_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    expected = {}
    for name in ("resnet", "vit"):
        model = MODELS[name]()
        result = adapter.quantize_pretrained(model, batches(model), progress=False)
        result.model.save_pretrained(tmp_path / name)
        batch = batches(model)[0]
        expected[name] = (batch, result.model(**batch).logits.detach())
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import torch, bgd_plugin
from transformers import AutoModelForImageClassification
bgd_plugin.load_adapter("transformers")
for name, (batch, logits) in torch.load("expected.pt", weights_only=True).items():
    model = AutoModelForImageClassification.from_pretrained(name)
    assert torch.equal(model(**batch).logits, logits)
"""
    done = in_a_fresh_process(script, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_quantizes_without_data(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "float")
    expected = bgd.quantize_weights(model, BGDConfig(**SMALL))
    config = adapter.BGDQuantizationConfig(**SMALL)
    found = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    assert config.layers is None
    assert same_state(found, expected.model)
    found.save_pretrained(tmp_path / "small")
    assert same_state(found, type(model).from_pretrained(tmp_path / "small"))


def test_a_head_may_be_left_out_when_loading(tmp_path: Path) -> None:
    model = bert()
    result = adapter.quantize_pretrained(model, batches(model), progress=False)
    result.model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    batch = batches(model)[0]
    assert torch.equal(base(**batch).pooler_output, result.model.bert(**batch).pooler_output)


def test_modules_to_not_convert_are_matched_as_transformers_does() -> None:
    model = vit()
    config = adapter.BGDQuantizationConfig(modules_to_not_convert=["classifier", "vit.layers.0", "fc1"])
    result = adapter.quantize_pretrained(model, batches(model), config, progress=False)
    assert set(integration.placement_of(result.model)) == {
        f"vit.layers.1.{name}" for name in ("mlp.fc2", *(f"attention.{x}_proj" for x in "qkvo"))
    }
    assert {s.name for s in result.report.skipped} >= {"classifier", "vit.layers.0.mlp.fc2"}


def test_a_name_that_matches_nothing_is_an_error() -> None:
    model = vit()
    with pytest.raises(ConfigError, match="modules_to_not_convert: 'head' matches no layer; the model has vit"):
        adapter.quantize_pretrained(model, None, adapter.BGDQuantizationConfig(modules_to_not_convert=["head"]))
    with pytest.raises(ConfigError, match="give a list of names"):
        adapter.BGDQuantizationConfig(modules_to_not_convert="head")


def test_settings_are_fields_of_the_core_as_objects_or_plain_values() -> None:
    config = adapter.BGDQuantizationConfig(method="em", linear={"block_size": 8}, overrides=[["*fc1", None]])
    storage: dict[str, Any] = {name: SMALL[name] for name in ("codebook_storage", "weight_storage")}
    assert config.config == BGDConfig(
        **storage, method="em", linear=LayerConfig(block_size=8), overrides=(("*fc1", None),)
    )
    again = adapter.BGDQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again.config == config.config
    with pytest.raises(ConfigError, match="unknown bits"):
        adapter.BGDQuantizationConfig(bits=4)
    with pytest.raises(ConfigError, match="config and seed"):
        adapter.BGDQuantizationConfig(config=BGDConfig(max_divergence=None), seed=1)


def test_dequantize_gives_ordinary_layers_with_the_same_outputs() -> None:
    model = vit()
    result = adapter.quantize_pretrained(model, batches(model), progress=False)
    dense = result.model.dequantize()
    assert not integration.placement_of(dense)
    assert not hasattr(dense.config, "quantization_config")
    assert same_logits(dense, result.model)


def test_a_quantized_model_generates(tmp_path: Path) -> None:
    model = llama()
    result = adapter.quantize_pretrained(model, batches(model), progress=False)
    ids = torch.tensor([[3, 5, 7]])
    found = result.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    dense = result.model.dequantize().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 8)
    assert torch.equal(found, dense)


def test_training_lowers_the_divergence_at_the_tokens_that_count() -> None:
    torch.manual_seed(0)
    model = llama()
    data = batches(model)
    settings = BGDConfig(**SMALL, finetuning=FinetuningConfig(steps=100, learning_rate=0.05))
    trained = adapter.quantize_pretrained(model, data, settings, progress=False).model
    plain = adapter.quantize_pretrained(model, data, BGDConfig(**SMALL), progress=False).model
    assert divergence(model, trained, data) < divergence(model, plain, data)


@torch.no_grad()
def divergence(teacher: Any, student: Any, data: list[dict[str, Tensor]]) -> float:
    return sum(float(kl_to_teacher(student(**b).logits, teacher(**b).logits, b["attention_mask"].bool())) for b in data)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    result = adapter.quantize_pretrained(model, batches(model), progress=False)
    placement = integration.placement_of(result.model)
    assert placement["lm_head"] == placement["model.embed_tokens"]
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for network in (result.model, loaded):
        assert network.lm_head.codebook is network.model.embed_tokens.codebook
        assert network.lm_head.codes is network.model.embed_tokens.codes
    assert same_logits(result.model, loaded)


def test_weights_that_attention_reads_by_name(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape, image_size=32, patch_size=8)).eval()
    result = adapter.quantize_pretrained(model, batches(model), progress=False)
    assert any(path.endswith("head.attention.in_proj_weight") for path in integration.placement_of(result.model))
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_state(result.model, loaded)
    batch = batches(model)[0]
    assert torch.equal(loaded(**batch).pooler_output, result.model(**batch).pooler_output)


def test_zeros_of_a_pruned_model_stay_zero(tmp_path: Path) -> None:
    model = vit()
    names = [f"vit.layers.{i}.mlp.fc1" for i in (0, 1)]
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight[weight.abs() < weight.abs().median()] = 0
    config = adapter.BGDQuantizationConfig(preserve_zeros=True)
    result = adapter.quantize_pretrained(model, batches(model), config, progress=False)
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_state(result.model, loaded)
    for name in names:
        assert torch.equal(loaded.get_submodule(name).weight == 0, model.get_submodule(name).weight == 0)


def test_frozen_norms(tmp_path: Path) -> None:
    model = resnet()
    config = adapter.BGDQuantizationConfig(freeze_norms=True)
    result = adapter.quantize_pretrained(model, batches(model), config, progress=False)
    adapter.save_pretrained(result.model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert any(type(module).__name__ == "FrozenNorm" for module in loaded.modules())
    assert same_state(result.model, loaded)


def test_shards(tmp_path: Path) -> None:
    model = vit()
    result = adapter.quantize_pretrained(model, batches(model), progress=False)
    result.model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_logits(result.model, type(model).from_pretrained(tmp_path))


def test_the_card_says_how_to_load(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "13 layers are product-quantized" in text
    assert 'bgd_plugin.load_adapter("transformers")' in text
    (folder / "README.md").write_text(f"# My model\n\n{text}\nThe end\n")
    adapter.save_pretrained(AutoModelForImageClassification.from_pretrained(folder), folder)
    again = (folder / "README.md").read_text()
    assert again.startswith("# My model\n\n<!-- bgd_plugin: begin -->")
    assert again.endswith("The end\n")
    assert again.count("bgd_plugin: begin") == 1
    with pytest.raises(ConfigError, match="not quantized by bgd_plugin"):
        adapter.model_card_section(vit())


@pytest.mark.parametrize("buffers", [False, True])
def test_parts_on_disk_compute_the_same_and_are_not_saved(buffers: bool, folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    places = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "disk"}
    parts = AutoModelForImageClassification.from_pretrained(
        folder, device_map=places, offload_folder=folder / "disk", offload_buffers=buffers
    )
    assert parts.get_submodule("vit.layers.0.mlp.fc1").codebook.is_meta
    assert same_logits(parts, model)
    with pytest.raises(ConfigError, match="is offloaded to disk: load the model without"):
        parts.save_pretrained(folder / "again")


@pytest.mark.parametrize("places", ["auto", {"": "cpu"}])
def test_device_maps(places: Any, folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert same_logits(AutoModelForImageClassification.from_pretrained(folder, device_map=places), model)


def test_another_type_of_numbers_when_loading(folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    name = "vit.layers.0.mlp.fc1"
    assert torch.equal(half.get_submodule(name).codes, model.get_submodule(name).codes)
    batch = batches(model)[0]["pixel_values"]
    with torch.no_grad():
        difference = half(pixel_values=batch.bfloat16()).logits.float() - model(pixel_values=batch).logits
    assert float(difference.abs().max()) < 0.05


def test_gradients_reach_the_codebooks(folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    model(**batches(model)[0]).logits.sum().backward()
    assert model.get_submodule("vit.layers.0.mlp.fc1").codebook.grad is not None
