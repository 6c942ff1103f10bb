"""A folder with a quantized model that is damaged, edited or incomplete, and models that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig, integration
from bgd_plugin.errors import CheckpointError, ConfigError

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

adapter: Any = bgd.load_adapter("transformers")

import transformers  # noqa: E402
from transformers import AutoModelForImageClassification  # noqa: E402

from tests.adapters.transformers.small import batches, folder, in_a_fresh_process, vit  # noqa: E402

__all__ = ["folder"]


def edited(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= values
    file.write_text(json.dumps(config))


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
