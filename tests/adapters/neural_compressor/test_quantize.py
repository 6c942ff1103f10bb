"""Quantizing through neural-compressor's entry points: the same codes as the core, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")

import torch
from neural_compressor.torch.quantization import RTNConfig, convert, prepare, quantize
from torch import fx, nn

import bgd_plugin as bgd
from bgd_plugin import BGDError, LayerConfig
from bgd_plugin.errors import CalibrationError, ConfigError
from bgd_plugin.nn import PQModule
from bgd_plugin_adapters.neural_compressor import BGDConfig, load
from tests.adapters.neural_compressor.networks import IMAGES, VECTORS, conv_net, feed, kinds, linears

RUN = feed(IMAGES)


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks hold the same state, codes and all."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _quantized(config: Any, **options: Any) -> Any:
    return quantize(conv_net(), config, run_fn=RUN, **options)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"method": "em", "batchnorm": "keep", "float_storage": "float32"},
    {"linear": LayerConfig(block_size=8, codebook_size=16), "overrides": (("fc2", None),), "seed": 7},
    {"first_layer": LayerConfig(block_size=3), "rounds": 1, "asymmetric_step": 0.25},
    {"target_ratio": 6.0},
    {"method": "em", "distillation": bgd.DistillationConfig(steps=3, batch_size=8)},
    {"method": "em", "finetuning": bgd.FinetuningConfig(steps=4)},
    {
        "reconstruction": bgd.ReconstructionConfig(steps=3),
        "finetuning": bgd.FinetuningConfig(steps=2, outputs=("fc1",)),
    },
    {"codebook_storage": "float16", "weight_storage": "float32", "refit_depthwise": False, "depthwise_conv": None},
    {"freeze_norms": True, "target_bytes": 9000, "batchnorm": "reestimate"},
    {"linear": LayerConfig(codes="trellis"), "conv": LayerConfig(codes="trellis")},
    {"target_ratio": 6.0, "codes": "trellis"},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=[", ".join(c) or "default" for c in CONFIGS])
def test_it_gives_the_codes_of_the_core(settings: dict[str, Any]) -> None:
    expected = bgd.quantize(conv_net(), IMAGES, bgd.BGDConfig(**settings, max_divergence=None), progress=False)
    result = _quantized(BGDConfig(**settings, max_divergence=None))
    assert _same(result, expected.model)
    assert result.report.compressed_bytes == expected.report.compressed_bytes


@pytest.mark.parametrize("settings", CONFIGS, ids=[", ".join(c) or "default" for c in CONFIGS])
def test_settings_survive_json_and_a_saved_folder(settings: dict[str, Any], tmp_path: Any) -> None:
    config = BGDConfig(**settings, max_divergence=None)
    config.to_json_file(str(tmp_path / "config.json"))
    again = BGDConfig.from_json_file(str(tmp_path / "config.json"))
    assert again == config
    assert all(getattr(again, name) == value for name, value in settings.items())
    result = _quantized({"bgd": config.to_dict()})
    result.save(str(tmp_path / "saved"))
    loaded = load(str(tmp_path / "saved"), conv_net())
    assert loaded.qconfig == result.qconfig
    assert _same(loaded, result)
    assert torch.equal(loaded(IMAGES[0]), result(IMAGES[0]))


def _forms(model: nn.Module) -> dict[str, str]:
    return {name: module.form.name for name, module in model.named_modules() if isinstance(module, PQModule)}


def test_the_form_of_codes_is_set_for_the_network_or_for_single_layers(tmp_path: Any) -> None:
    trellis = LayerConfig(codes="trellis")
    kinds_of_layer = dict.fromkeys(("conv", "pointwise_conv", "linear"), trellis)
    expected = bgd.quantize(conv_net(), IMAGES, bgd.BGDConfig(max_divergence=None, **kinds_of_layer), progress=False)
    result = _quantized(BGDConfig(form="trellis", max_divergence=None))
    assert _same(result, expected.model)
    assert set(_forms(result).values()) == {"trellis"}

    config = BGDConfig(block_size=4, codebook_size=8, max_divergence=None)
    config.set_local("fc1", BGDConfig(form="trellis"))
    config.to_json_file(str(tmp_path / "config.json"))
    result = _quantized(BGDConfig.from_json_file(str(tmp_path / "config.json")))
    assert {name: form for name, form in _forms(result).items() if form == "trellis"} == {"fc1": "trellis"}
    assert result.get_submodule("fc2").block_size == 4

    config = BGDConfig(form="trellis", max_divergence=None)
    config.set_local("fc1", BGDConfig(form="blocks", block_size=8, codebook_size=8))
    result = _quantized(config)
    assert {name for name, form in _forms(result).items() if form == "blocks"} == {"fc1"}
    assert result.get_submodule("fc1").block_size == 8


def test_sizes_beside_trellis_codes_and_unknown_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="give 'blocks' or 'trellis'"):
        BGDConfig(form="entropy")
    _fails(BGDConfig(form="trellis", block_size=8, max_divergence=None), "leave both sizes out")
    config = BGDConfig(form="trellis", max_divergence=None)
    config.set_local("fc1", BGDConfig(block_size=8))
    _fails(config, "leave both sizes out")


def test_every_setting_of_the_core_is_a_parameter() -> None:
    names = set(bgd.BGDConfig(max_divergence=None).to_dict()) - {"version"}
    assert names <= set(BGDConfig(max_divergence=None).get_params_dict())
    assert names <= set(BGDConfig(max_divergence=None).params_list)


def test_quantize_leaves_the_network_that_was_given_as_it_was() -> None:
    model = conv_net()
    before = copy.deepcopy(model.state_dict())
    quantize(model, BGDConfig(max_divergence=None), run_fn=RUN)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_run_args_reach_run_fn() -> None:
    def run_fn(model: Any, batches: Any, times: int) -> None:
        for batch in batches[:times]:
            model(batch)

    result = quantize(conv_net(), BGDConfig(max_divergence=None), run_fn=run_fn, run_args=(IMAGES, 2))
    assert _same(result, bgd.quantize(conv_net(), IMAGES[:2], bgd.BGDConfig(max_divergence=None), progress=False).model)


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("inplace", [True, False])
def test_prepare_and_convert(is_traced: bool, inplace: bool) -> None:
    model = fx.symbolic_trace(conv_net()) if is_traced else conv_net()
    prepared = prepare(model, BGDConfig(max_divergence=None), inplace=inplace)
    RUN(prepared)
    result = convert(prepared, inplace=inplace)
    assert _same(result, bgd.quantize(conv_net(), IMAGES, bgd.BGDConfig(max_divergence=None), progress=False).model)


def test_convert_passes_a_teacher_on() -> None:
    settings: dict[str, Any] = {"method": "em", "finetuning": bgd.FinetuningConfig(steps=3)}
    teacher = conv_net().requires_grad_(False)
    torch.nn.init.normal_(teacher.fc2.weight)
    prepared = prepare(conv_net(), BGDConfig(**settings, max_divergence=None))
    RUN(prepared)
    result = convert(prepared, teacher=teacher, progress=False)
    core = bgd.quantize(
        conv_net(), IMAGES, bgd.BGDConfig(**settings, max_divergence=None), teacher=teacher, progress=False
    )
    assert _same(result, core.model)


def test_convert_passes_the_options_of_the_core_on(tmp_path: Any) -> None:
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "run"), "memory_bytes": 100_000, "reproducible": True}
    config = {"target_ratio": 100.0}  # which only the bytes of a larger network, before pruning, make reachable
    prepared = prepare(conv_net(), BGDConfig(**config, max_divergence=None))
    RUN(prepared)
    result = convert(prepared, progress=False, original_bytes=10**6, **options)
    assert (tmp_path / "run").is_dir()
    assert result.report.original_bytes == 10**6
    assert any("in memory" in note for note in result.report.notes)
    expected = bgd.quantize(
        conv_net(), IMAGES, bgd.BGDConfig(**config, max_divergence=None), original_bytes=10**6, progress=False
    )
    assert _same(result, expected.model)


def test_local_configs_by_name_type_and_fp32() -> None:
    config = BGDConfig(max_divergence=None).set_local(nn.Linear, BGDConfig(block_size=8, codebook_size=8))
    config.set_local("fc2", BGDConfig(dtype="fp32"))
    result = _quantized(config)
    assert kinds(result)["fc2"] == "Linear"
    assert (result.fc1.block_size, result.fc1.codebook_size) == (8, 8)
    assert result.conv.block_size == 9
    overrides = (("fc2", None), ("fc1", LayerConfig(block_size=8, codebook_size=8)))
    assert _same(
        result,
        bgd.quantize(conv_net(), IMAGES, bgd.BGDConfig(overrides=overrides, max_divergence=None), progress=False).model,
    )


def test_a_codebook_alone_keeps_the_block_size() -> None:
    result = _quantized(BGDConfig(max_divergence=None).set_local("conv", BGDConfig(codebook_size=16)))
    assert (result.conv.block_size, result.conv.codebook_size) == (9, 16)


@pytest.mark.parametrize(
    ("white_list", "expected"),
    [(["conv"], {"conv"}), (["fc"], {"fc1", "fc2"}), ([nn.Linear], {"fc1", "fc2"}), (["stem", "fc2"], {"stem", "fc2"})],
)
def test_a_white_list_quantizes_nothing_else(white_list: list[Any], expected: set[str]) -> None:
    found = {
        name
        for name, kind in kinds(_quantized(BGDConfig(white_list=white_list, max_divergence=None))).items()
        if kind[:2] == "PQ"
    }
    assert found == expected


def test_a_whole_name_is_no_prefix() -> None:
    class Net(nn.Sequential):
        pass

    net = Net()
    for i in (0, 1, 10):
        net.add_module(f"layer{i}", nn.Sequential(nn.Linear(30, 30)))
    result = quantize(net, BGDConfig(white_list=["layer1"], max_divergence=None), run_fn=feed(VECTORS))
    assert kinds(result) == {"layer0.0": "Linear", "layer1.0": "PQLinear", "layer10.0": "Linear"}


def test_a_copy_of_the_result_keeps_what_it_holds() -> None:
    result = _quantized(BGDConfig(max_divergence=None))
    again = copy.deepcopy(result)
    assert _same(again, result)
    assert again.qconfig == result.qconfig
    assert again.report == result.report
    assert torch.equal(again(IMAGES[0]), result(IMAGES[0]))


def _fails(config: Any, *words: str, error: type[BGDError] = ConfigError, model: Any = None) -> None:
    with pytest.raises(error) as info:
        quantize(model or conv_net(), config, run_fn=RUN)
    for word in words:
        assert word in str(info.value)


def test_without_calibration() -> None:
    with pytest.raises(CalibrationError, match="give run_fn"):
        quantize(conv_net(), BGDConfig(max_divergence=None))
    with pytest.raises(CalibrationError, match="was not called"):
        convert(prepare(conv_net(), BGDConfig(max_divergence=None)))
    with pytest.raises(CalibrationError, match="is not prepared"):
        convert(conv_net(), BGDConfig(max_divergence=None))


def test_a_run_fn_that_fails_leaves_no_hook() -> None:
    model = conv_net()
    with pytest.raises(ZeroDivisionError):
        quantize(model, BGDConfig(max_divergence=None), run_fn=lambda _: 1 / 0)
    assert not model._forward_pre_hooks


def test_unknown_parameters_and_bad_values() -> None:
    with pytest.raises(ConfigError, match="unknown bits; it has dtype, block_size"):
        BGDConfig(bits=4, max_divergence=None)
    with pytest.raises(ConfigError, match="method='best'"):
        BGDConfig(method="best", max_divergence=None)
    with pytest.raises(ConfigError, match="dtype='int4'"):
        BGDConfig(dtype="int4", max_divergence=None)
    with pytest.raises(ConfigError, match="codebook_size=100"):
        BGDConfig(codebook_size=[256, 100], max_divergence=None)


def test_names_and_types_that_match_nothing() -> None:
    _fails(
        BGDConfig(max_divergence=None).set_local("head", BGDConfig()),
        "'head'",
        "stem, conv, fc1, fc2",
    )
    _fails(BGDConfig(white_list=[nn.Conv1d], max_divergence=None), "'type:Conv1d'", "no layer has that type")
    _fails(BGDConfig(overrides=(("head*", None),), max_divergence=None), "'head*' matches no layer")


def test_two_configs_for_one_layer() -> None:
    _fails(
        BGDConfig(block_size=4, max_divergence=None) + BGDConfig(block_size=2, max_divergence=None),
        "two BGDConfigs for the whole network",
        "block_size",
    )
    one, two = (BGDConfig(white_list=["fc1"], block_size=size, max_divergence=None) for size in (2, 4))
    _fails(one + two, "two BGDConfigs for fc1")


def test_what_holds_for_the_whole_network_is_not_local() -> None:
    _fails(
        BGDConfig(max_divergence=None).set_local("fc1", BGDConfig(method="em")),
        "'fc1' sets method",
        "whole network",
    )


def test_choices_are_for_autotune() -> None:
    _fails(BGDConfig(block_size=[4, 2], max_divergence=None), "block_size is a list of 2 values", "autotune")


def test_nothing_to_quantize() -> None:
    _fails(BGDConfig(dtype="fp32", max_divergence=None), "nothing would be quantized")
    _fails(BGDConfig(white_list=None, max_divergence=None), "its white_list names none")
    _fails(
        BGDConfig(white_list=["fc1"], block_size=5, max_divergence=None),
        "32 weights per row do not divide into blocks of 5",
    )


def test_a_layer_that_is_asked_for_and_cannot_be_quantized() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.read, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.read(self.first(x))) + self.read.weight.sum()

    run_fn = feed([torch.randn(8, 32) for _ in range(2)])
    with pytest.raises(ConfigError, match=r"'read' would quantize nothing"):
        quantize(Penalized().eval(), BGDConfig(white_list=["read", "last"], max_divergence=None), run_fn=run_fn)


def test_a_network_that_is_quantized_already() -> None:
    result = _quantized(BGDConfig(white_list=["fc1", "fc2", "conv"], max_divergence=None))
    _fails(BGDConfig(max_divergence=None), "already quantized", model=copy.deepcopy(result))
    _fails(BGDConfig(white_list=["fc1"], max_divergence=None), "no layer has that name", model=copy.deepcopy(result))
    rtn = quantize(linears(), RTNConfig())
    with pytest.raises(ConfigError, match="no linear layer that is not quantized already"):
        quantize(rtn, BGDConfig(max_divergence=None), run_fn=feed(VECTORS))
