"""Ours beside neural-compressor's algorithms for language models: every float layer is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import transformers
from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, TEQConfig, quantize
from torch import nn

from bgd_plugin.errors import ConfigError
from bgd_plugin.integration import PQModule
from bgd_plugin_adapters.neural_compressor import BGDConfig

# neural-compressor's, of what it imports and of torch's functions that it calls
pytestmark = pytest.mark.filterwarnings("ignore")

_BLOCKS = range(2)
_MLP = [f"model.layers.{i}.mlp" for i in _BLOCKS]
_ABSORBED = {
    f"model.layers.{i}.input_layernorm": [f"model.layers.{i}.self_attn.{name}_proj" for name in "qkv"] for i in _BLOCKS
}
TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "gptq": (GPTQConfig, {}),
    "awq": (AWQConfig, {}),
    "teq": (TEQConfig, {"absorb_to_layer": _ABSORBED}),
}


CASES = [("gptq", True), ("awq", True), ("awq", False), ("teq", True), ("teq", False)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model in a folder: GPTQ looks for the folder that a model came from."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    place = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


def _run(model: Any) -> None:
    for _ in range(2):
        model(TOKENS)


def _theirs(name: str, *, is_alone: bool) -> Any:
    """A config of theirs, which leaves out the layers of ours if these are still float when it is applied."""
    kind, settings = CONFIGS[name]
    config = kind(bits=4, group_size=16, **settings)
    for layer in (f"{path}.{part}_proj" for path in _MLP for part in ("gate", "up", "down")):
        if not is_alone:
            config.set_local(layer, kind(dtype="fp32"))
    return config


@pytest.mark.parametrize(("name", "ours_first"), CASES)
def test_every_float_layer_is_accounted_for(name: str, ours_first: bool, folder: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    ours = BGDConfig(white_list=_MLP, method="em")
    theirs = _theirs(name, is_alone=ours_first)
    for config in (ours, theirs) if ours_first else (theirs, ours):
        model = quantize(model, config, run_fn=_run, example_inputs=TOKENS)
    quantized = {path for path, module in model.named_modules() if isinstance(module, PQModule)}
    foreign = {p for p, module in model.named_modules() if type(module).__module__.startswith("neural_compressor")}
    inside = {path for path in wanted if any(path == one or path.startswith(f"{one}.") for one in foreign)}
    assert quantized == {path for path in wanted if ".mlp." in path}
    assert inside & {path for path in wanted if ".self_attn." in path}
    assert wanted <= quantized | inside | {skipped.name for skipped in model.report.skipped}
    with torch.no_grad():
        assert bool(model(TOKENS).logits.isfinite().all())


def test_gptq_takes_all_layers_of_its_blocks_and_leaves_ours_none(folder: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = quantize(model, _theirs("gptq", is_alone=False), run_fn=_run, example_inputs=TOKENS)
    with pytest.raises(ConfigError, match=r"no layer has that name; the network has lm_head"):
        quantize(model, BGDConfig(white_list=_MLP, method="em"), run_fn=_run, example_inputs=TOKENS)
