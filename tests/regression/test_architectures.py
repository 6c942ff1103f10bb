"""Published architectures, small, random weights: the class comes back, and computes with the decoded weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig

pytestmark = pytest.mark.slow

_SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# the class, its configuration, and what it is called with
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "BertModel": ("BertConfig", _SMALL, ("input_ids",)),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ("input_ids",),
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        ("input_ids", "decoder_input_ids"),
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**_SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
        ("input_ids",),
    ),
    "GemmaForCausalLM": ("GemmaConfig", {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}, ("input_ids",)),
}
TORCHVISION = ["shufflenet_v2_x0_5"]


def _first(output: Any) -> Tensor:
    value: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    return value


def _check(build: Callable[[], nn.Module], data: list[Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()

    def call(network: nn.Module) -> Any:
        with torch.no_grad():
            return network(**data[0]) if isinstance(data[0], dict) else network(data[0])

    config = BGDConfig(
        method="em", em_iterations=3, batchnorm="keep", float_storage="float32", freeze_norms=False, max_divergence=None
    )
    found = bgd.quantize(model, data, config, progress=False).model
    assert type(found) is type(model)
    assert type(call(found)) is type(call(model))
    bgd.save(found, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=build().eval())
    assert type(loaded) is type(model)
    assert torch.equal(_first(call(loaded)), _first(call(found)))
    plain = build().eval()
    plain.load_state_dict(bgd.materialize(found).state_dict())
    torch.testing.assert_close(_first(call(plain)), _first(call(found)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings, values, inputs = TRANSFORMERS[name]
    config = getattr(transformers, settings)(**values)
    tokens = [torch.randint(3, 99, (2, 12)) for _ in range(2)]
    _check(lambda: getattr(transformers, name)(config), [dict.fromkeys(inputs, ids) for ids in tokens], tmp_path)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    models = importlib.import_module("torchvision.models")
    _check(lambda: getattr(models, name)(num_classes=10), [torch.randn(2, 3, 64, 64) for _ in range(2)], tmp_path)
