"""What users do around a quantized model day by day: copies, composed models, options of loading, ways to train."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import accelerate
import transformers

import bgd_plugin as bgd
from bgd_plugin.integration import placement_of
from tests.adapters.transformers.common import quantized
from tests.adapters.transformers.test_training import arguments
from tests.adapters.transformers.zoo import ZOO, answer

adapter: Any = bgd.load_adapter("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def _of_two(kind: str) -> Any:
    config: Any = ZOO["bert"].settings
    config = {name: value for name, value in config.items() if name != "num_labels"}
    if kind == "encoder":
        return transformers.BertModel(transformers.BertConfig(**config))
    return transformers.BertLMHeadModel(transformers.BertConfig(is_decoder=True, add_cross_attention=True, **config))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_saved_like_the_model(how: Any, tmp_path: Path) -> None:
    model = quantized("llama")
    how(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(answer(again, ZOO["llama"]), answer(model, ZOO["llama"]))


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(encoder=_of_two("encoder"), decoder=_of_two("decoder")).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    batch = ZOO["bart"].batch(1)
    config = adapter.BGDQuantizationConfig(rounds=0, em_iterations=5)
    small = adapter.quantize_pretrained(model, [batch], config, progress=False).model
    small.save_pretrained(tmp_path)
    again = transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, small(**batch).logits)


def test_two_quantized_folders_become_one_model(tmp_path: Path) -> None:
    quantized("bert").save_pretrained(tmp_path)
    both = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(str(tmp_path), str(tmp_path))
    batch = ZOO["bart"].batch(1)
    assert bool(both(**batch).logits.isfinite().all())
    assert any(path.startswith("encoder.") for path in placement_of(both))
    assert any(path.startswith("decoder.") for path in placement_of(both))


def test_options_of_loading(tmp_path: Path) -> None:
    model = quantized("llama")
    model.save_pretrained(tmp_path / "inside", variant="small", max_shard_size="10KB")
    options = {"subfolder": "inside", "variant": "small", "device_map": "auto"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(answer(again, ZOO["llama"]), answer(model, ZOO["llama"]))


def test_pictures_of_another_size(tmp_path: Path) -> None:
    quantized("vit").save_pretrained(tmp_path)
    options = {"image_size": 64, "ignore_mismatched_sizes": True}
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, **options)
    assert again(pixel_values=torch.randn(1, 3, 64, 64)).logits.shape == (1, 3)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static"}, {"assistant_model": "llama"}], ids=str
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    model = quantized("llama")
    if "assistant_model" in options:
        options = {"assistant_model": quantized("llama")}
    tokens = ZOO["llama"].batch(1)["input_ids"][:1]
    found = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
    assert found.shape[1] > tokens.shape[1]


def _rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_training_in_half_precision_with_activation_checkpoints(tmp_path: Path) -> None:
    model = quantized("llama")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    options = {"activation_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True}
    transformers.Trainer(model, arguments(tmp_path, **options), train_dataset=_rows()).train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {f"{path}.codebook" for path, sizes in placement_of(model).items() if sizes} <= moved


def test_a_state_of_accelerate_brings_the_model_back(tmp_path: Path) -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer in half precision
    model = quantized("llama")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_state(str(tmp_path / "state"))
    before = answer(model, ZOO["llama"])
    batch = ZOO["llama"].batch(1)
    accelerator.backward(prepared(**batch, labels=batch["input_ids"]).loss)
    optimizer.step()
    assert not torch.equal(answer(model, ZOO["llama"]), before)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(answer(model, ZOO["llama"]), before)
    unwrapped, state = accelerator.unwrap_model(prepared), accelerator.get_state_dict(prepared)
    unwrapped.save_pretrained(tmp_path / "folder", state_dict=state, save_function=accelerator.save)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(answer(again, ZOO["llama"]), before)
