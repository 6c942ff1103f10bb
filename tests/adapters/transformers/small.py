"""Small models of transformers, their inputs, and a folder with a quantized one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'"
)
adapter: Any = bgd.load_adapter("transformers")

__all__ = ["MODELS", "batches", "bert", "folder", "in_a_fresh_process", "llama", "resnet", "same_logits", "vit"]

ROOT = Path(__file__).resolve().parents[3]


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
