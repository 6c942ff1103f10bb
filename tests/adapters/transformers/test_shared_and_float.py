"""Folders of models that share modules, whose classes leave parameters out of a folder, and that are float again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import transformers

import bgd_plugin as bgd
from bgd_plugin.integration import PQModule
from tests.adapters.transformers.common import EMBEDDING, quantized, saved
from tests.adapters.transformers.zoo import ZOO, answer

adapter: Any = bgd.load_adapter("transformers")


def test_parameters_that_a_class_leaves_out_of_its_folder_are_saved_as_they_are(tmp_path: Path) -> None:
    model = saved("marian", tmp_path, **EMBEDDING)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert model._keys_to_ignore_on_save  # Marian's sinusoidal positions, rounded here to half precision
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def _with_one_mlp() -> Any:
    model = ZOO["llama"].build()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def test_a_module_that_the_user_put_at_two_places(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    config = adapter.BGDQuantizationConfig(rounds=0, em_iterations=5)
    model = adapter.quantize_pretrained(_with_one_mlp(), [entry.batch(1)], config, progress=False).model
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    model.save_pretrained(tmp_path / "one")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")  # its class has two such modules
    assert torch.equal(answer(again, entry), answer(model, entry))
    one, other = (layer.mlp.up_proj for layer in again.model.layers)
    assert one is not other
    assert one.codebook is other.codebook
    again.save_pretrained(tmp_path / "two")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("one", "two")]
    assert sizes[0] == sizes[1]
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(answer(third, entry), answer(model, entry))


def _from_the_config(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()


def _materialized(folder: Path) -> Any:
    return bgd.materialize(transformers.AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("made", [_from_the_config, _materialized])
def test_a_float_model_whose_config_is_of_a_quantized_one_is_saved_as_a_float_model(made: Any, tmp_path: Path) -> None:
    quantized("qwen2", **EMBEDDING).save_pretrained(tmp_path / "small")
    model = made(tmp_path / "small")
    assert not any(isinstance(module, PQModule) for module in model.modules())
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(answer(again, ZOO["qwen2"]), answer(model, ZOO["qwen2"]))
    assert again.lm_head.weight is again.model.embed_tokens.weight
