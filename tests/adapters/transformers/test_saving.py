"""What is saved is what was asked for, and a folder that loads, whichever entrance quantized the model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")

import transformers

import bgd_plugin as bgd
from bgd_plugin import integration
from bgd_plugin.errors import ConfigError
from tests.adapters.transformers.common import EMBEDDING, in_a_fresh_process, quantized
from tests.adapters.transformers.zoo import ZOO, answer

adapter: Any = bgd.load_adapter("transformers")


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path: Path) -> None:
    model = quantized("bert")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    codebook = "bert.encoder.layer.0.output.dense.codebook"
    state["bert.pooler.dense.bias"] += 1
    state[codebook] *= 2
    before = answer(model, ZOO["bert"])
    model.save_pretrained(tmp_path, state_dict=state)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.state_dict()[codebook], state[codebook])
    assert torch.allclose(again.bert.pooler.dense.bias, state["bert.pooler.dense.bias"], atol=1e-3)
    assert torch.equal(answer(model, ZOO["bert"]), before)


def test_a_part_of_a_state_dict(tmp_path: Path) -> None:
    model = quantized("bert")
    state = {name: value for name, value in model.state_dict().items() if name.startswith("bert.")}
    model.save_pretrained(tmp_path, state_dict=state)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again.classifier) is nn.Linear
    inside = again.bert.encoder.layer[0].output.dense
    assert torch.equal(inside.codes, model.bert.encoder.layer[0].output.dense.codes)


@pytest.mark.parametrize("missing", ["codebook", "shape"])
def test_half_a_layer_is_refused(missing: str, tmp_path: Path) -> None:
    model = quantized("bert")
    state: dict[str, Tensor] = dict(model.state_dict())
    if missing == "codebook":
        del state["classifier.codebook"]
    else:
        state["classifier.codes"] = state["classifier.codes"][:1]
    with pytest.raises(ConfigError, match=r"layer 'classifier': .*give all tensors of a layer or none"):
        model.save_pretrained(tmp_path, state_dict=state)


def by_the_core(model: Any, batches: list[Any]) -> Any:
    return bgd.quantize(model, batches, bgd.BGDConfig(rounds=0, max_divergence=None), progress=False).model


def by_torchao(model: Any, batches: list[Any]) -> Any:
    ao = pytest.importorskip("torchao") and bgd.load_adapter("torchao")
    ao.quantize_(model, ao.BGDWeightOnlyConfig(rounds=0, max_divergence=None), calibration=batches, progress=False)
    return model


def by_torchao_itself(model: Any, batches: list[Any]) -> Any:
    from torchao.quantization import quantize_

    quantize_(model, bgd.load_adapter("torchao").BGDWeightOnlyConfig())
    return model


def by_modelopt(model: Any, batches: list[Any]) -> Any:
    pytest.importorskip("modelopt")

    def loop(network: Any) -> None:
        for batch in batches:
            network(**batch)

    return bgd.load_adapter("modelopt").quantize(model, {"rounds": 0, "max_divergence": None}, loop)


ENTRANCES = {f.__name__: f for f in (by_the_core, by_torchao, by_torchao_itself, by_modelopt)}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_a_model_of_another_entrance_is_saved_as_a_folder_that_loads(entrance: str, name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model = ENTRANCES[entrance](entry.build(), [entry.batch(1)])
    if not isinstance(model, transformers.PreTrainedModel):
        pytest.skip("this entrance gives a graph, which has no save_pretrained")
    try:
        model.save_pretrained(tmp_path)
    except ConfigError as error:
        assert "cannot be saved as a folder that loads" in str(error)
        return
    again = type(model).from_pretrained(tmp_path)
    assert integration.placement_of(again) == integration.placement_of(model)
    assert torch.allclose(answer(again, entry), answer(model, entry), atol=1e-4)


def test_modelopts_own_checkpoints_of_hugging_face_models(tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    in_a_fresh_process(
        """
import warnings
warnings.simplefilter("ignore")
import bgd_plugin as bgd, modelopt.torch.opt as mto, torch
from tests.adapters.transformers.zoo import ZOO, answer
adapter = bgd.load_adapter("modelopt")
bgd.load_adapter("transformers")
mto.enable_huggingface_checkpointing()
entry = ZOO["bert"]
model = entry.build()
adapter.quantize(model, {"rounds": 0, "max_divergence": None}, lambda network: network(**entry.batch(1)))
model.save_pretrained("folder")
again = type(model).from_pretrained("folder")
assert torch.equal(answer(again, entry), answer(model, entry))
assert adapter.report(again) == adapter.report(model)
""",
        tmp_path,
    )


def test_a_process_that_knows_nothing_of_the_adapter_saves_a_folder_that_loads(tmp_path: Path) -> None:
    in_a_fresh_process(
        """
import bgd_plugin as bgd, torch, transformers
from tests.adapters.transformers.zoo import ZOO, answer
entry = ZOO["bert"]
model = entry.build()
small = bgd.quantize_weights(model, bgd.BGDConfig(em_iterations=3)).model
small.save_pretrained("folder")
again = type(model).from_pretrained("folder")
assert torch.allclose(answer(again, entry), answer(small, entry), atol=1e-4)
""",
        tmp_path,
    )


def test_a_layer_that_no_folder_gives_back_is_refused(tmp_path: Path) -> None:
    model = ZOO["bert"].build()
    model.classifier = nn.Sequential(nn.Linear(32, 32), integration.quantize_module(nn.Linear(32, 3)))
    with pytest.raises(ConfigError, match="cannot be saved as a folder that loads"):
        model.save_pretrained(tmp_path)


def test_torchaos_config_quantizes_and_does_not_save(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    ours = bgd.load_adapter("torchao").BGDWeightOnlyConfig()
    ZOO["bert"].build().save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=transformers.TorchAoConfig(ours)
    )
    assert len(integration.placement_of(model)) >= 12
    assert bool(answer(model, ZOO["bert"]).isfinite().all())
    with pytest.raises(ConfigError, match=r"TorchAoHfQuantizer would save it.*BGDQuantizationConfig"):
        model.save_pretrained(tmp_path / "small")


def test_copies_and_pickles_save_the_same(tmp_path: Path) -> None:
    model = quantized("qwen2", **EMBEDDING)
    for index, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.save_pretrained(tmp_path / str(index))
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(index))
        assert torch.equal(answer(again, ZOO["qwen2"]), answer(model, ZOO["qwen2"]))


@pytest.mark.parametrize("settings", [{}, EMBEDDING], ids=["head", "both"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "t5"])
def test_token_embeddings_are_resized(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(name, **settings)
    before = answer(model, ZOO[name])
    model.resize_token_embeddings(80, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 80
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert before.numel() and integration.placement_of(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.get_input_embeddings().weight.shape[0] == 80
    assert torch.equal(answer(again, ZOO[name]), answer(model, ZOO[name]))


def test_the_local_part_of_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("bert")
    hub = type("Hub", (), {"create_repo": lambda *_, **__: type("Url", (), {"repo_id": "me/small"})()})()
    card = type("Card", (), {"save": lambda _, path: Path(path).write_text("card")})()
    module = transformers.utils.hub
    monkeypatch.setattr(module, "hf_api", lambda *_: hub)
    monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: card)

    def upload(folder: Any, repo: str, **options: Any) -> str:
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(answer(again, ZOO["bert"]), answer(model, ZOO["bert"]))
        return repo

    monkeypatch.setattr(type(model), "_upload_modified_files", staticmethod(upload))
    assert model.push_to_hub("me/small") == "me/small"
    with pytest.raises(ConfigError, match="upload_folder"):
        adapter.save_pretrained(model, tmp_path, push_to_hub=True)


def test_a_pipeline_takes_a_quantized_model() -> None:
    model = quantized("vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    image = __import__("PIL.Image", fromlist=["new"]).new("RGB", (40, 40), (10, 200, 30))
    assert len(pipe(image)) == 3


def test_bfloat16(tmp_path: Path) -> None:
    quantized("llama").save_pretrained(tmp_path / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == torch.bfloat16
    assert torch.equal(answer(again, ZOO["llama"]), answer(model, ZOO["llama"]))
