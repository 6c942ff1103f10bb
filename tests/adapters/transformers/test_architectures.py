"""One small model of each architecture: quantized, saved, and read again bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import transformers

import bgd_plugin as bgd
from bgd_plugin import integration
from tests.adapters.transformers.common import EMBEDDING, in_a_fresh_process, saved
from tests.adapters.transformers.zoo import QUICK, ZOO, answer

adapter: Any = bgd.load_adapter("transformers")


def check(names: tuple[str, ...], folder: Path) -> None:
    """Quantize and save each; load all of them in one new process, and compare what they say."""
    expected = {}
    for name in names:
        model = saved(name, folder / name)
        assert sum(map(bool, integration.placement_of(model).values())) >= 4
        expected[name] = answer(model, ZOO[name])
    torch.save(expected, folder / "expected.pt")
    in_a_fresh_process(
        """
import torch, transformers, bgd_plugin
from tests.adapters.transformers.zoo import ZOO, answer
bgd_plugin.load_adapter("transformers")
wrong = []
for name, wanted in torch.load("expected.pt").items():
    model = getattr(transformers, ZOO[name].model).from_pretrained(name)
    if not torch.equal(answer(model, ZOO[name]), wanted):
        wrong.append(name)
assert not wrong, wrong
""",
        folder,
    )


def test_read_again_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    check(QUICK, tmp_path)


@pytest.mark.slow
def test_every_architecture_is_read_again_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    assert len(ZOO) >= 40
    check(tuple(ZOO), tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "t5", "opt", "gemma2", "bart"])
def test_quantized_embeddings_stay_tied_and_are_stored_once(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "small", **EMBEDDING)
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(answer(again, ZOO[name]), answer(model, ZOO[name]))
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    one, other = (getattr(m, "codebook", None) for m in (head, embedding))
    assert one is other if one is not None else head.weight is embedding.weight
    again.tie_weights()
    assert torch.equal(answer(again, ZOO[name]), answer(model, ZOO[name]))
    again.save_pretrained(tmp_path / "again")
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("small", "again")]
    assert sizes[0] == sizes[1]
    vocabulary, width = embedding.weight.shape
    tables = 2 * vocabulary * width
    assert sizes[0] < 2 * sum(p.numel() for p in model.parameters()) + tables + 40_000


def test_a_weight_norm_that_stays_float_is_read_again(tmp_path: Path) -> None:
    model = saved("wav2vec2", tmp_path, modules_to_not_convert=["encoder.pos_conv_embed"])
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(answer(again, ZOO["wav2vec2"]), answer(model, ZOO["wav2vec2"]))


@pytest.mark.parametrize("name", ["qwen2", "wav2vec2", "siglip"])
def test_quantized_without_data_and_read_again(name: str, tmp_path: Path) -> None:
    float_model = ZOO[name].build()
    float_model.save_pretrained(tmp_path / "float")
    config = adapter.BGDQuantizationConfig(em_iterations=5, **EMBEDDING)
    model = type(float_model).from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(answer(again, ZOO[name]), answer(model, ZOO[name]))


def test_folders_of_before_name_no_shapes_and_store_tied_layers_twice(tmp_path: Path) -> None:
    import json

    import safetensors.torch

    model = saved("qwen2", tmp_path, **EMBEDDING)
    file = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    for part in ("weight", "codebook"):  # as they were written
        first = "model.embed_tokens" if f"model.embed_tokens.{part}" in state else "lm_head"
        for path in ("model.embed_tokens", "lm_head"):
            state[f"{path}.{part}"] = state[f"{first}.{part}"].clone()
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["shapes"], config["quantization_config"]["tied"]
    files = adapter.BGDHfQuantizer.__module__.rpartition(".")[0] + ".files"
    layers = config["quantization_config"]["layers"]
    config["quantization_config"]["checksum"] = __import__(files, fromlist=["checksum"]).checksum(layers, state)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(answer(again, ZOO["qwen2"]), answer(model, ZOO["qwen2"]))
    assert again.lm_head.codebook is again.model.embed_tokens.codebook
