"""Hugging Face transformers: quantized with data and without, saved, loaded elsewhere; against the core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, FinetuningConfig, LayerConfig, integration
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin.training import kl_to_teacher
from tests.adapters.entrances import same_state

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

adapter: Any = bgd.load_adapter("transformers")

import transformers  # noqa: E402
from transformers import AutoModel, AutoModelForImageClassification  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "max_divergence": None,
    "conv": LayerConfig(block_size=9, codebook_size=32),
    "linear": LayerConfig(block_size=4, codebook_size=16),
    "codebook_storage": "float16",
    "weight_storage": "float16",
}


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config).eval()


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama(**fields: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
        **fields,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(model: Any, count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(count)]
    ids = [torch.randint(1, 50, (4, 12), generator=generator) for _ in range(count)]
    masks = [(torch.arange(12) < torch.tensor([12, 9, 12, 5])[:, None]).long() for _ in range(count)]
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


MODELS = {"resnet": resnet, "vit": vit, "bert": bert, "llama": llama}


@torch.no_grad()
def same_logits(one: Any, other: Any) -> bool:
    return all(torch.equal(one(**b).logits, other(**b).logits) for b in batches(one))


def in_a_fresh_process(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'adapters')!r}]\n"
    plain = os.environ | {"BGD_KERNELS": "off"}  # as the tests themselves
    return subprocess.run([sys.executable, "-c", path + script], cwd=folder, env=plain, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized ViT, in blocks of 4."""
    model = vit()
    config = adapter.BGDQuantizationConfig(max_divergence=None)
    result = adapter.quantize_pretrained(model, batches(model), config, progress=False)
    adapter.save_pretrained(result.model, tmp_path / "vit")
    return tmp_path / "vit"


def edited(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= values
    file.write_text(json.dumps(config))


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
    assert "lm_head" not in integration.placement_of(result.model)
    result.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
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


def test_loading_without_the_adapter_fails_loudly(folder: Path) -> None:
    done = in_a_fresh_process(
        "import transformers\ntransformers.AutoModelForImageClassification.from_pretrained('.')", folder
    )
    assert done.returncode != 0
    assert "Unknown quantization type, got bgd" in done.stderr + done.stdout
    assert "ignore_mismatched_sizes" in done.stderr
    assert "load_adapter('transformers')" in (folder / "config.json").read_text()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_with_one_file_missing_is_an_error(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises((OSError, ValueError), match=r"config.json|model.safetensors"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    model = vit()
    adapter.quantize_pretrained(model, None).model.save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(OSError, match="safetensors"):
        type(model).from_pretrained(tmp_path)


def test_an_edited_config_is_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layers = dict(config["layers"])
    sizes = layers.pop("vit.layers.0.mlp.fc1")
    edited(folder, layers=layers)
    with pytest.raises(CheckpointError, match=r"'vit.layers.0.mlp.fc1' is in the files, but not in config.json"):
        AutoModelForImageClassification.from_pretrained(folder)
    edited(folder, layers=layers | {"vit.layers.0.mlp.fc1": sizes, "nothing": [4, 16]})
    with pytest.raises(CheckpointError, match="'nothing' is missing in the files"):
        AutoModelForImageClassification.from_pretrained(folder)
    edited(folder, layers=layers | {"vit.layers.0.mlp.fc1": [5, 16]})
    with pytest.raises(CheckpointError, match="blocks of 5"):
        AutoModelForImageClassification.from_pretrained(folder)
    edited(folder, layers=None)
    with pytest.raises(CheckpointError, match="names no layers"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("part", ["weight", "codebook"])
def test_edited_codes_and_codebooks_are_an_error(folder: Path, part: str) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state[f"vit.layers.0.mlp.fc1.{part}"][0] = 1
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged or edited"):
        AutoModelForImageClassification.from_pretrained(folder)
    del state[f"vit.layers.0.mlp.fc1.{part}"]
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'vit.layers.0.mlp.fc1' is missing in the files"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_file_cut_short_is_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|[Hh]eader"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_model_that_is_quantized_already_is_an_error(folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(ConfigError, match="quantized already, by 'bgd'"):
        adapter.quantize_pretrained(model, None)


def test_a_model_that_torchao_has_quantized_is_an_error(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    vit().save_pretrained(tmp_path)
    int8 = quantization.Int8WeightOnlyConfig(version=2)
    by_config = AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=transformers.TorchAoConfig(int8)
    )
    with pytest.raises(ConfigError, match="quantized already, by 'torchao'"):
        adapter.quantize_pretrained(by_config, None)
    by_hand = AutoModelForImageClassification.from_pretrained(tmp_path)
    quantization.quantize_(by_hand, int8)
    with pytest.raises(ConfigError, match=r"weight' is a tensor type of another library \(Int8Tensor\)"):
        adapter.quantize_pretrained(by_hand, batches(by_hand))


def test_a_second_config_for_a_quantized_folder_is_refused_by_transformers(folder: Path) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForImageClassification.from_pretrained(
            folder, quantization_config=adapter.BGDQuantizationConfig(linear=LayerConfig(block_size=8))
        )
    assert {sizes[0] for sizes in integration.placement_of(model).values()} == {4}
    other = transformers.QuantoConfig(weights="int8")
    with pytest.raises(ValueError, match="quantized with BGDQuantizationConfig but you are passing a QuantoConfig"):
        AutoModelForImageClassification.from_pretrained(folder, quantization_config=other)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model is a Linear"):
        adapter.quantize_pretrained(nn.Linear(8, 8), None)


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
