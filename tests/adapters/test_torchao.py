"""torchao: its own `quantize_` with our config, and ours with calibration data; against the core."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, DistillationConfig, FinetuningConfig, LayerConfig, ReconstructionConfig, integration
from bgd_plugin.errors import CheckpointError, ConfigError
from tests.adapters.digits import accuracy, digits, trained_on_digits
from tests.adapters.entrances import same_state
from tests.networks import PlainNet, same_outputs, vectors

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'bgd-plugin[torchao]'")

adapter: Any = bgd.load_adapter("torchao")

from torchao.core.config import config_from_dict, config_to_dict  # noqa: E402
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_  # noqa: E402

SMALL: dict[str, Any] = {
    "conv": LayerConfig(block_size=9, codebook_size=32),
    "linear": LayerConfig(block_size=4, codebook_size=16),
    "max_divergence": None,
}


def any_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith(".codes")}


def test_calibrated_gives_the_cores_codes_and_accuracy() -> None:
    model, data = trained_on_digits(), [digits()[0][:200]]
    expected = bgd.quantize(model, data, BGDConfig(**SMALL), progress=False)
    config = adapter.BGDWeightOnlyConfig(**SMALL)
    report = adapter.quantize_(model, config, any_layer, calibration=data, progress=False)
    assert type(model) is type(trained_on_digits())
    assert same_state(model, expected.model)
    assert accuracy(model) == accuracy(expected.model) > 0.8
    assert report.compressed_bytes == expected.report.compressed_bytes
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.report.layers]


def test_torchaos_own_quantize_gives_the_cores_codes_without_data() -> None:
    model = PlainNet()
    expected = bgd.quantize_weights(model)
    quantize_(model, adapter.BGDWeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "0")
    assert codes(model).keys() == codes(expected.model).keys() == {"2.codes", "4.codes"}
    found, wanted = model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(found[f"{n}.{part}"], wanted[f"{n}.{part}"]) for n in "24" for part in ("codes", "codebook"))


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(16, 16, 3), nn.Embedding(128, 16)], ids=repr)
def test_a_bare_layer_is_quantized_itself(layer: Any) -> None:
    wanted = integration.quantize_module(layer, adapter.BGDWeightOnlyConfig(embedding=LayerConfig(block_size=4)))
    calls: list[Any] = []
    layer.register_forward_hook(lambda module, *_: calls.append(module))
    config = adapter.BGDWeightOnlyConfig(embedding=LayerConfig(block_size=4))
    quantize_(layer, config, lambda module, name: True)
    assert type(layer) is type(wanted)
    assert torch.equal(layer.weight, wanted.weight)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in wanted.named_parameters()]
    layer(_input(layer))
    assert calls == [layer]


def _input(layer: Any) -> torch.Tensor:
    if hasattr(layer, "num_embeddings"):
        return torch.arange(8)
    return torch.randn(2, 16, 8, 8) if hasattr(layer, "kernel_size") else torch.randn(2, 64)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_at_two_names_is_quantized_at_both(by_name: bool) -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(8, 64), shared, nn.ReLU(), shared)
    config = adapter.BGDWeightOnlyConfig()
    if by_name:
        quantize_(model, FqnToConfig(OrderedDict({"1": config})), filter_fn=None)
    else:
        quantize_(model, config, lambda module, name: module is shared)
    assert model[1] is model[3]
    assert set(integration.placement_of(model)) == {"1"}
    assert not [m for m in model if isinstance(m, nn.Linear) and m.in_features == 64]


@pytest.mark.parametrize("name", ["1", "3"])
def test_ours_takes_any_name_of_a_module_that_has_two(name: str) -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(8, 64), shared, nn.ReLU(), shared)
    rules = FqnToConfig(OrderedDict({name: adapter.BGDWeightOnlyConfig()}))
    adapter.quantize_(model, rules, calibration=[torch.randn(64, 8)], progress=False)
    assert model[1] is model[3]
    assert set(integration.placement_of(model)) == {"1"}


def test_ours_refuses_a_bare_layer() -> None:
    with pytest.raises(ConfigError, match="no linear layer"):
        adapter.quantize_(nn.Linear(64, 64), adapter.BGDWeightOnlyConfig())


def test_a_parameter_of_a_layer_is_refused_by_torchao() -> None:
    rules = FqnToConfig(OrderedDict({"2.weight": adapter.BGDWeightOnlyConfig()}))
    with pytest.raises(NotImplementedError, match="parameter quantization"):
        quantize_(PlainNet(), rules, filter_fn=None)


def test_ours_without_data_is_the_cores() -> None:
    model = trained_on_digits()
    expected = bgd.quantize_weights(model, BGDConfig(**SMALL))
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig(**SMALL), any_layer)
    assert same_state(model, expected.model)


def test_the_filter_chooses() -> None:
    model = trained_on_digits()
    report = adapter.quantize_(
        model,
        adapter.BGDWeightOnlyConfig(**SMALL),
        lambda module, name: name.startswith("conv"),
        calibration=[digits()[0][:50]],
        progress=False,
    )
    assert set(codes(model)) == {"conv1.codes", "conv2.codes"}
    assert {layer.name for layer in report.layers} == {"conv1", "conv2"}


def test_settings_by_name_and_other_configs_of_torchao_beside_them() -> None:
    model = PlainNet()
    coarse = adapter.BGDWeightOnlyConfig(linear=LayerConfig(block_size=8, codebook_size=16))
    fine = adapter.BGDWeightOnlyConfig(linear=LayerConfig(block_size=2, codebook_size=8))
    rules = FqnToConfig(OrderedDict({"2": coarse, "re:[1-4]": fine, "0": Int8WeightOnlyConfig(version=2)}))
    data = vectors()
    adapter.quantize_(model, rules, calibration=data, progress=False)
    assert integration.placement_of(model) == {"2": (8, 16), "4": (2, 8)}
    assert type(model[0].weight).__name__ == "Int8Tensor"
    assert torch.isfinite(model(data[0])).all()


def test_torchaos_own_quantize_takes_settings_by_name() -> None:
    model = PlainNet()
    coarse = adapter.BGDWeightOnlyConfig(linear=LayerConfig(block_size=8, codebook_size=16))
    quantize_(model, FqnToConfig(OrderedDict({"2": coarse, "re:4": None})), filter_fn=None)
    assert integration.placement_of(model) == {"2": (8, 16)}


def test_every_field_of_the_core_is_a_field_of_the_config() -> None:
    data = vectors()
    settings: dict[str, Any] = {"method": "em", "seed": 3, "em_iterations": 4, "finetuning": FinetuningConfig(steps=2)}
    settings["max_divergence"] = None
    model = PlainNet()
    expected = bgd.quantize(model, data, BGDConfig(**settings), progress=False)
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig(**settings), calibration=data, progress=False)
    assert same_state(model, expected.model)


TRAINED: dict[str, Any] = {
    "max_divergence": None,
    "method": "em",
    "distillation": DistillationConfig(steps=2, batch_size=8),
    "reconstruction": ReconstructionConfig(steps=2),
    "finetuning": FinetuningConfig(steps=2, layers=("2",), outputs=("2", "4")),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 4, "conv": None, "linear": LayerConfig(block_size=8)},
        TRAINED,
        {"freeze_norms": True, "target_ratio": 2},
    ],
    ids=["sizes", "training", "of networks"],
)
def test_a_config_goes_through_torchaos_json_and_back(settings: dict[str, Any]) -> None:
    config = adapter.BGDWeightOnlyConfig(**settings)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert all(getattr(again, name) == getattr(config, name) for name in settings)


def test_settings_that_came_out_of_json_train_as_the_core_does() -> None:
    model, data = PlainNet(), vectors()
    expected = bgd.quantize(model, data, BGDConfig(**TRAINED), progress=False)
    config = config_from_dict(json.loads(json.dumps(config_to_dict(adapter.BGDWeightOnlyConfig(**TRAINED)))))
    adapter.quantize_(model, config, calibration=data, progress=False)
    assert same_state(model, expected.model)


def test_every_field_of_the_core_survives_torchaos_json() -> None:
    """A new field that torchao's JSON cannot hold is found here."""
    for config in (BGDConfig(max_divergence=None), BGDConfig.paper("small"), BGDConfig.paper("large")):
        ours = adapter.BGDWeightOnlyConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
        assert config_from_dict(json.loads(json.dumps(config_to_dict(ours)))) == ours


def test_frozen_norms_are_restored_from_a_state_dict() -> None:
    model, data = trained_on_digits(), [digits()[0][:100]]
    settings: dict[str, Any] = SMALL | {"freeze_norms": True}
    expected = bgd.quantize(model, data, BGDConfig(**settings), progress=False)
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig(**settings), any_layer, calibration=data, progress=False)
    assert same_state(model, expected.model)
    state = model.state_dict()
    assert "bn1.running_mean" not in state
    fresh = adapter.make_room_(trained_on_digits(), state)
    fresh.load_state_dict(state)
    assert same_outputs(model, fresh, data)


def test_saved_and_restored_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    model, data = PlainNet(), vectors()
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig(), calibration=data, progress=False)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save((data[0], model(data[0]).detach()), tmp_path / "expected.pt")
    script = """
import torch, bgd_plugin
from tests.networks import PlainNet
adapter = bgd_plugin.load_adapter("torchao")
state = torch.load("state.pt", weights_only=True)
with torch.device("meta"):
    model = PlainNet()
adapter.make_room_(model, state).load_state_dict(state, assign=True)
x, y = torch.load("expected.pt", weights_only=True)
assert torch.equal(model(x), y)
"""
    root = Path(__file__).resolve().parents[2]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'adapters')!r}]\n"
    subprocess.run([sys.executable, "-c", path + script], cwd=tmp_path, check=True)


def test_a_name_that_matches_nothing_is_an_error() -> None:
    rules = FqnToConfig(OrderedDict({"nothing": adapter.BGDWeightOnlyConfig()}))
    with pytest.raises(ConfigError, match="FqnToConfig: nothing matches no layer; the network has 0, 2, 4"):
        adapter.quantize_(PlainNet(), rules)


def test_a_filter_that_accepts_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="filter_fn accepts no module"):
        adapter.quantize_(PlainNet(), adapter.BGDWeightOnlyConfig(), lambda module, name: False)


def test_a_module_without_our_form_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(ConfigError, match="layer '1' cannot be quantized: a LayerNorm has no product-quantized form"):
        adapter.quantize_(model, adapter.BGDWeightOnlyConfig(), lambda module, name: name == "1")
    with pytest.raises(ConfigError, match="a LayerNorm cannot be quantized"):
        quantize_(model, adapter.BGDWeightOnlyConfig(), lambda module, name: name == "1")


def test_two_configs_of_ours_on_one_layer_are_an_error() -> None:
    model = PlainNet()
    quantize_(model, adapter.BGDWeightOnlyConfig())
    again: Any = lambda module, name: name == "2"  # noqa: E731
    with pytest.raises(ConfigError, match="is already quantized"):
        quantize_(model, adapter.BGDWeightOnlyConfig(), again)
    with pytest.raises(ConfigError, match="layer '2' is already quantized"):
        adapter.quantize_(model, adapter.BGDWeightOnlyConfig(), again)


def test_a_model_that_torchao_has_quantized_is_an_error() -> None:
    model = PlainNet()
    quantize_(model, Int8WeightOnlyConfig(version=2))
    with pytest.raises(ConfigError, match=r"layer '0' is already quantized by torchao \(Int8Tensor\)"):
        adapter.quantize_(model, adapter.BGDWeightOnlyConfig())
    with pytest.raises(ConfigError, match="already quantized by torchao"):
        quantize_(model, adapter.BGDWeightOnlyConfig())


def test_a_layer_of_torchaos_anywhere_in_the_network_is_an_error_that_names_it() -> None:
    model = PlainNet()
    quantize_(model, Int8WeightOnlyConfig(version=2), lambda module, name: name == "4")
    message = r"'4.weight' is a tensor type of another library \(Int8Tensor\).*quantize the float network first"
    with pytest.raises(ConfigError, match=message):
        adapter.quantize_(model, adapter.BGDWeightOnlyConfig(), lambda module, name: name == "2")
    with pytest.raises(ConfigError, match=message):
        bgd.quantize(model, vectors(), bgd.BGDConfig(max_divergence=None), progress=False)
    with pytest.raises(ConfigError, match=message):
        bgd.plan(model)


def test_torchao_may_have_what_we_left() -> None:
    model = PlainNet()
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig(), calibration=vectors(), progress=False)
    before = model.get_submodule("2").weight.detach()
    quantize_(model, Int8WeightOnlyConfig(version=2))
    assert type(model[0].weight).__name__ == "Int8Tensor"
    assert torch.equal(model.get_submodule("2").weight, before)
    assert torch.isfinite(model(vectors()[0])).all()


def test_what_needs_the_whole_network_is_refused_by_torchaos_own_quantize() -> None:
    with pytest.raises(ConfigError, match="finetuning: needs the whole network"):
        quantize_(PlainNet(), adapter.BGDWeightOnlyConfig(finetuning=FinetuningConfig(steps=1)))
    for settings in ({"freeze_norms": True}, {"reconstruction": ReconstructionConfig()}, {"target_ratio": 4.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}: needs the whole network"):
            quantize_(PlainNet(), adapter.BGDWeightOnlyConfig(**settings))
    with pytest.raises(ConfigError, match="finetuning: training needs data"):
        adapter.quantize_(PlainNet(), adapter.BGDWeightOnlyConfig(finetuning=FinetuningConfig(steps=1)))


def test_overrides_are_refused_since_torchao_has_names_of_its_own() -> None:
    with pytest.raises(ConfigError, match="FqnToConfig"):
        adapter.BGDWeightOnlyConfig(overrides=(("fc", None),))


def test_another_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="config is a Int8WeightOnlyConfig"):
        adapter.quantize_(PlainNet(), Int8WeightOnlyConfig(version=2))


def test_configs_that_differ_in_more_than_sizes_are_refused() -> None:
    rules = FqnToConfig(
        OrderedDict({"2": adapter.BGDWeightOnlyConfig(), "4": adapter.BGDWeightOnlyConfig(method="em")})
    )
    with pytest.raises(ConfigError, match="layer '4': configs of one network may differ"):
        adapter.quantize_(PlainNet(), rules)


def test_a_state_dict_of_another_network_is_refused() -> None:
    model = PlainNet()
    with pytest.raises(CheckpointError, match="has no layer with a codebook"):
        adapter.make_room_(model, model.state_dict())
    state = {"9.codebook": torch.zeros(4, 2), "9.codes": torch.zeros(3, 2, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="'9': the network has no such convolution or linear layer"):
        adapter.make_room_(model, state)


@pytest.mark.parametrize("part", ["codes", "codebook", "bias"])
def test_a_state_dict_that_lacks_a_part_of_a_layer_is_an_error(part: str) -> None:
    model = PlainNet()
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig())
    state = model.state_dict()
    del state[f"2.{part}"]
    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key\(s\) in state_dict: .*2\."):
        adapter.make_room_(PlainNet(), state).load_state_dict(state)


def test_edited_codes_without_a_codeword_are_an_error() -> None:
    model = PlainNet()
    adapter.quantize_(model, adapter.BGDWeightOnlyConfig())
    state = model.state_dict()
    state["2.codes"] = state["2.codes"] + 200
    with pytest.raises(RuntimeError, match=r"2\.codes: codes range from .* there are 32 codewords"):
        adapter.make_room_(PlainNet(), state).load_state_dict(state)


def test_registering_twice_does_nothing_more() -> None:
    adapter.register()
    model = PlainNet()
    quantize_(model, adapter.BGDWeightOnlyConfig())
    assert same_outputs(model, bgd.materialize(model), vectors())
