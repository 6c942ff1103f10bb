"""peft's LoRA on quantized linear layers: trained, saved, loaded, never merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install peft")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import peft
import transformers

import bgd_plugin as bgd
from bgd_plugin.errors import ConfigError
from bgd_plugin.integration import PQModule
from tests.adapters.transformers.common import quantized
from tests.adapters.transformers.test_training import arguments, rows
from tests.adapters.transformers.zoo import ZOO, answer

adapter: Any = bgd.load_adapter("transformers")


# peft asks transformers by a name that transformers has since changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def config(**fields: Any) -> Any:
    settings = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False} | fields
    return adapter.on_quantized_layers(peft.LoraConfig(**settings))


def test_adapters_train_beside_layers_that_stay(tmp_path: Path) -> None:
    model = quantized("bert")
    held = {k: v.clone() for k, v in model.state_dict().items()}
    with_adapters = peft.get_peft_model(model, config())
    assert sum(isinstance(m, PQModule) for m in with_adapters.modules()) == 14
    trainer = transformers.Trainer(with_adapters, arguments(tmp_path / "o"), train_dataset=rows())
    trainer.train()
    state = {
        k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in with_adapters.state_dict().items()
    }
    assert all(torch.equal(state[name], value) for name, value in held.items())
    with_adapters.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size < 30_000
    fresh = adapter.on_quantized_layers(peft.LoraConfig.from_pretrained(tmp_path / "adapters"))
    again = peft.PeftModel.from_pretrained(quantized("bert"), tmp_path / "adapters", config=fresh).eval()
    batch = ZOO["bert"].batch(9)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, with_adapters.eval()(**batch).logits)
        with again.disable_adapter():
            assert torch.equal(again(**batch).logits, quantized("bert")(**batch).logits)


@pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 22), reason="transformers asks for peft 0.22 here"
)
def test_transformers_own_add_adapter(tmp_path: Path) -> None:
    model = quantized("bert")
    before = answer(model, ZOO["bert"])
    model.add_adapter(config())
    assert not torch.equal(answer(model, ZOO["bert"]), before)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_of_lora_train(options: dict[str, Any]) -> None:
    model = peft.prepare_model_for_kbit_training(quantized("bert"), use_gradient_checkpointing=False)
    with_adapters = peft.get_peft_model(model, config(**options))
    batch = ZOO["bert"].batch(9)
    with_adapters(**batch, labels=torch.zeros(len(batch["input_ids"]), dtype=torch.long)).loss.backward()
    trained = {name for name, p in with_adapters.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained
    assert all("lora_" in name for name in trained)


def test_two_adapters_take_turns_and_one_batch_takes_both() -> None:
    model = peft.get_peft_model(quantized("bert"), config(), adapter_name="one")
    model.add_adapter("two", config(r=2))
    batch = ZOO["bert"].batch(9)
    answers = {}
    with torch.no_grad():
        for name in ("one", "two"):
            model.set_adapter(name)
            answers[name] = model.eval()(**batch).logits
        assert not torch.allclose(answers["one"], answers["two"])
        names = ["one", "two", "one"]
        both = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        assert torch.allclose(both[row], answers[name][row], atol=1e-5)


def test_an_adapter_is_not_merged_into_codes() -> None:
    with_adapters = peft.get_peft_model(quantized("bert"), config())
    with pytest.raises(ConfigError, match="cannot be merged into a quantized layer"):
        with_adapters.merge_and_unload()


def test_an_adapter_is_merged_once_the_model_is_float() -> None:
    with_adapters = peft.get_peft_model(quantized("bert"), config()).eval()
    batch = ZOO["bert"].batch(9)
    merged = bgd.materialize(with_adapters).merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, with_adapters(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_initializations_that_write_to_the_weight_are_refused(how: str) -> None:
    with pytest.raises(ConfigError, match="writes to the weights"):
        config(init_lora_weights=how)


def test_without_our_config_peft_says_that_it_does_not_know_the_layer() -> None:
    with pytest.raises(ValueError, match=r"PQLinear.*is not supported"):
        peft.get_peft_model(quantized("bert"), peft.LoraConfig(target_modules=["query"]))
