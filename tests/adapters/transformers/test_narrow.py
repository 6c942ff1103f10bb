"""A folder's large float embedding is held as narrow as in the folder; what transformers does with it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import transformers

import bgd_plugin as bgd
from bgd_plugin.integration import NarrowModule
from tests.adapters.transformers.files import content

adapter: Any = bgd.load_adapter("transformers")
TOKENS = torch.tensor([[1, 2, 3, 4000]])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small model whose head is tied to an embedding of a million weights, and its folder."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=4096, num_hidden_layers=1, tie_word_embeddings=True, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    settings = adapter.BGDQuantizationConfig(method="em", em_iterations=1, max_divergence=None)
    small = adapter.quantize_pretrained(model, [{"input_ids": TOKENS}], settings, progress=False).model
    folder = tmp_path_factory.mktemp("folder")
    small.save_pretrained(folder)
    return small, folder


def _read(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
        return found


def test_embedding_and_head_share_one_narrow_weight(quantized: tuple[Any, Path]) -> None:
    small, folder = quantized
    model = _read(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, NarrowModule) and isinstance(head, NarrowModule)
    assert embedding.numbers is head.numbers
    assert model.dtype == torch.float32
    assert not any(isinstance(module, NarrowModule) for module in small.modules())  # it may be trained further
    torch.testing.assert_close(_logits(model), _logits(small), rtol=1e-5, atol=1e-5)
    words = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(words, small.generate(TOKENS, max_new_tokens=4, do_sample=False))


def test_a_folder_that_was_read_is_saved_with_the_same_bytes(quantized: tuple[Any, Path], tmp_path: Path) -> None:
    model = _read(quantized[1])
    model.tie_weights()
    model.save_pretrained(tmp_path)
    files = [content(folder / "model.safetensors") for folder in (quantized[1], tmp_path)]
    assert files[0] == files[1]
    assert torch.equal(_logits(_read(tmp_path)), _logits(model))


def test_resized(quantized: tuple[Any, Path]) -> None:
    model = _read(quantized[1])
    before = _logits(model)
    model.resize_token_embeddings(4100)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is torch.nn.Embedding and embedding.weight is head.weight
    torch.testing.assert_close(_logits(model)[..., :4096], before, rtol=1e-5, atol=1e-5)


def test_trained_and_resumed(quantized: tuple[Any, Path], tmp_path: Path) -> None:
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 4

    def trained(model: Any, folder: Path, resume: Path | None = None) -> Any:
        settings = transformers.TrainingArguments(
            str(folder), max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3
        )
        trainer = transformers.Trainer(model, settings, train_dataset=rows)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model.eval()

    one = trained(_read(quantized[1]), tmp_path / "one")
    two = trained(_read(quantized[1]), tmp_path / "two", tmp_path / "one" / "checkpoint-2")
    assert not torch.equal(_logits(one), _logits(quantized[0]))
    assert torch.equal(_logits(one), _logits(two))
    assert torch.equal(one.lm_head.weight, quantized[0].lm_head.weight)


def test_widened_it_is_trained(quantized: tuple[Any, Path]) -> None:
    model: Any = bgd.integration.widen_(_read(quantized[1]))
    weight = model.get_input_embeddings().weight
    assert weight is model.lm_head.weight
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert weight.grad is not None and bool(weight.grad.any())
