"""Folders loaded for another task, with another head, with fewer layers, in part: as a float folder would be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import transformers

import bgd_plugin as bgd
from bgd_plugin.integration import PQModule
from tests.adapters.transformers.common import loaded, quantized
from tests.adapters.transformers.zoo import ZOO

adapter: Any = bgd.load_adapter("transformers")

_OURS = re.compile(r"\.(codes|codebook|mask)$")

# the model that is saved, the class that reads it, what it is told
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "base of a classifier": ("bert", "AutoModel", {}),
    "another task": ("bert", "AutoModelForTokenClassification", {}),
    "another task with another head": ("bert", "AutoModelForQuestionAnswering", {}),
    "more classes": ("bert", "AutoModelForSequenceClassification", {"num_labels": 7, "ignore_mismatched_sizes": True}),
    "fewer layers": ("bert", "AutoModelForSequenceClassification", {"num_hidden_layers": 1}),
    "more layers": ("bert", "AutoModelForSequenceClassification", {"num_hidden_layers": 3}),
    "other vocabulary": ("llama", "AutoModelForCausalLM", {"vocab_size": 80, "ignore_mismatched_sizes": True}),
    "classifier of a decoder": ("llama", "AutoModelForSequenceClassification", {"num_labels": 5}),
    "encoder of two": ("t5", "T5EncoderModel", {}),
    "image tower": ("clip", "CLIPVisionModel", {}),
    "text tower": ("clip", "CLIPTextModel", {}),
    "text tower with projection": ("clip", "CLIPTextModelWithProjection", {}),
    "image tower with attention pooling": ("siglip", "SiglipVisionModel", {}),
    "vision, more classes": (
        "vit",
        "AutoModelForImageClassification",
        {"num_labels": 9, "ignore_mismatched_sizes": True},
    ),
    "vision, base": ("resnet", "AutoModel", {}),
    "vision, backbone": ("resnet", "ResNetBackbone", {}),
    "a head on a base": ("wav2vec2", "AutoModelForAudioClassification", {}),
}


def as_float(names: Any) -> set[str]:
    """Names with those of quantized layers as the weights that they stand for."""
    return {_OURS.sub(".weight", name) for name in names}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_is_loaded_as_from_a_float_folder(case: str, tmp_path: Path) -> None:
    name, reader, options = PARTS[case]
    small = quantized(name)
    adapter.save_pretrained(small, tmp_path / "small")
    ZOO[name].build().save_pretrained(tmp_path / "float")
    kind = getattr(transformers, reader)
    wanted, of_float = loaded(kind, tmp_path / "float", **options)
    found, of_ours = loaded(kind, tmp_path / "small", **options)
    assert type(found) is type(wanted)
    assert as_float(of_ours["missing_keys"]) == as_float(of_float["missing_keys"])
    assert {key for key, *_ in of_ours["mismatched_keys"]} == {key for key, *_ in of_float["mismatched_keys"]}
    layers = {path: m for path, m in found.named_modules() if isinstance(m, PQModule)}
    assert layers
    codes = [m.codes for m in small.modules() if isinstance(m, PQModule)]
    assert all(any(torch.equal(layer.codes, other) for other in codes) for layer in layers.values())
    new = {key.rpartition(".")[0] for key in (*of_float["missing_keys"], *(k for k, *_ in of_float["mismatched_keys"]))}
    assert not new & set(layers)
    assert all(bool(p.isfinite().all()) and float(p.detach().abs().max()) < 10 for p in found.parameters())
    found.save_pretrained(tmp_path / "again")
    again = type(found).from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_tower_made_float_is_saved_without_a_word_of_codes(tmp_path: Path) -> None:
    model = quantized("clip").dequantize()
    model.save_pretrained(tmp_path)
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    assert torch.equal(tower.encoder.layers[0].mlp.fc1.weight, model.vision_model.encoder.layers[0].mlp.fc1.weight)


def test_a_new_head_is_a_fresh_float_layer(tmp_path: Path) -> None:
    quantized("bert").save_pretrained(tmp_path)
    kind = transformers.AutoModelForSequenceClassification
    again = kind.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert type(again.classifier) is nn.Linear
    assert not again.classifier.bias.any()


def test_a_head_of_another_size_is_an_error_unless_it_is_asked_for(tmp_path: Path) -> None:
    quantized("bert").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7)


def test_a_bias_that_the_folder_lacks_is_zero(tmp_path: Path) -> None:
    quantized("qwen3").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attention_bias=True)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, PQModule)
    assert not attention.q_proj.bias.any()
