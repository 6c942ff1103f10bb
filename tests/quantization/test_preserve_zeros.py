"""Weights that pruning left at zero are zero in what is decoded, and the bits that say which are in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin.files.format import METADATA_KEY
from bgd_plugin.files.inspection import inspected, inspection_text
from tests.encoding.test_masks import n_of_m
from tests.networks import FunctionalNet, SmallResNet, em, images, randomized, same_outputs, vectors

LAYERS = ("conv1", "conv2", "down", "fc")


@torch.no_grad()
def pruned(*, channels: bool = False) -> SmallResNet:
    """2:4 in the convolutions, an unstructured mask in the classifier; the stem has no zero."""
    model: SmallResNet = randomized(SmallResNet())
    for number, layer in enumerate((model.conv1, model.conv2, model.down)):
        layer.weight.mul_(n_of_m(tuple(layer.weight.shape), 2, 4, channels=channels, seed=number))
    model.fc.weight.mul_(torch.rand(model.fc.weight.shape) < 0.6)
    return model


def settings(method: str = "full", **fields: Any) -> BGDConfig:
    return BGDConfig(
        **({"method": method, "preserve_zeros": True, "codebook_storage": "float16"} | fields), max_divergence=None
    )


def zeros(model: nn.Module, name: str) -> Tensor:
    weight: Any = model.get_submodule(name).weight
    return weight.detach() == 0


def same_zeros(model: nn.Module, float_model: nn.Module) -> bool:
    return all(torch.equal(zeros(model, name), zeros(float_model, name)) for name in LAYERS)


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize("channels", [False, True])
def test_the_decoded_weights_have_exactly_the_zeros_of_the_mask(method: str, channels: bool, tmp_path: Path) -> None:
    model, path = pruned(channels=channels), tmp_path / "net.safetensors"
    result = bgd.quantize(model, images(), settings(method), progress=False)
    assert same_zeros(result.model, model)
    assert bgd.save(result.model, path) == path.stat().st_size == result.report.compressed_bytes
    assert bgd.plan(model, settings(method)).compressed_bytes == result.report.compressed_bytes
    for like in (model, SmallResNet().to("meta").eval()):
        loaded = bgd.load(path, like=like)
        assert same_outputs(loaded, result.model, images())
        assert same_zeros(loaded, model)
        assert same_zeros(bgd.materialize(loaded), model)
        assert same_outputs(bgd.materialize(loaded), result.model, images())


def test_without_the_setting_zeros_are_weights_like_the_others_and_cost_nothing() -> None:
    model = pruned()
    plain = bgd.quantize(model, images(), settings(preserve_zeros=False), progress=False)
    assert not same_zeros(plain.model, model)
    assert plain.report.compressed_bytes < bgd.plan(model, settings()).compressed_bytes


def test_the_bytes_of_the_masks_are_counted() -> None:
    plan = bgd.plan(pruned(), settings())
    plain = bgd.plan(pruned(), settings(preserve_zeros=False))
    for layer, without in zip(plan.layers, plain.layers, strict=True):
        assert layer.compressed_bytes == without.compressed_bytes + layer.mask_bytes
    assert {layer.name: (layer.mask_form, layer.mask_bytes) for layer in plan.layers} == {
        "conv1": ("2:4", 16 * 72 // 4 * 3 // 8),
        "conv2": ("2:4", 16 * 144 // 4 * 3 // 8),
        "down": ("2:4", 16 * 8 // 4 * 3 // 8),
        "fc": ("bits", 5 * 16 // 8),
    }
    assert plan.compressed_bytes - plain.compressed_bytes >= sum(layer.mask_bytes for layer in plan.layers)
    assert plan.paper_bytes - plain.paper_bytes == sum(layer.mask_bytes for layer in plan.layers)
    assert "zeros: 2:4, 0.75 bits/weight" in str(plan)


def test_inspect_shows_the_masks(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    bgd.save(bgd.quantize(pruned(), images(), settings(), progress=False).model, path)
    content = inspected(path)
    assert content["parts_bytes"]["masks"] == 108 + 216 + 12 + 10
    assert sum(content["parts_bytes"].values()) == content["file_bytes"] == path.stat().st_size
    assert {layer["name"]: layer["mask"] for layer in content["layers"]}["conv1"] == "2:4"
    assert "2:4, 0.11 KiB" in inspection_text(content)
    assert not [other for other in content["others"] if other["name"].endswith("mask")]


@pytest.mark.parametrize("method", ["em", "full"])
def test_training_keeps_the_zeros(method: str) -> None:
    model = pruned()
    config = settings(
        method,
        distillation=bgd.DistillationConfig(steps=2, batch_size=4, learning_rate=0.01),
        finetuning=bgd.FinetuningConfig(steps=2),
    )
    result = bgd.quantize(model, images(), config, progress=False)
    assert same_zeros(result.model, model)
    assert all(result.model.get_submodule(name).get_parameter("codebook").isfinite().all() for name in LAYERS)


def test_a_run_goes_on_with_its_masks(tmp_path: Path) -> None:
    model = pruned()
    first = bgd.quantize(model, images(), settings(), checkpoint=tmp_path, progress=False)
    again = bgd.quantize(model, images(), settings(), checkpoint=tmp_path, progress=False)
    assert same_outputs(first.model, again.model, images())
    with pytest.raises(CheckpointError, match="another config"):
        bgd.quantize(model, images(), settings(preserve_zeros=False), checkpoint=tmp_path, progress=False)


def test_weights_that_are_read_as_plain_tensors_keep_their_zeros() -> None:
    model = FunctionalNet().eval()
    with torch.no_grad():
        model.kernel.mul_(n_of_m((16, 8, 3, 3), 2, 4))
    result = bgd.quantize(model, images(), settings(), progress=False)
    assert torch.equal(bgd.materialize(result.model).get_parameter("kernel") == 0, model.kernel == 0)


def test_a_layer_too_wide_for_its_gram_keeps_its_zeros() -> None:
    model = nn.Sequential(nn.Linear(12, 9000), nn.ReLU(), nn.Linear(9000, 4)).eval()
    with torch.no_grad():
        model[2].weight.mul_(n_of_m((4, 9000), 2, 4))
    result = bgd.quantize(model, vectors(), settings(), progress=False)
    assert torch.equal(zeros(result.model, "2"), zeros(model, "2"))
    assert "fitted to the pooled Gram" in result.report.layers[0].note


def test_a_layer_of_nothing_but_zeros_is_fitted() -> None:
    model = pruned()
    with torch.no_grad():
        model.conv2.weight.zero_()
    result = bgd.quantize(model, images(), settings("em"), progress=False)
    assert same_zeros(result.model, model)


def test_a_second_pass_finds_the_masked_layers_finished() -> None:
    model = pruned()
    once = bgd.quantize(model, images(), settings(), progress=False).model
    with pytest.raises(ConfigError, match="already quantized"):
        bgd.quantize(once, images(), settings(), progress=False)


def test_a_network_without_zeros_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer to be quantized has a weight that is zero: prune"):
        bgd.plan(randomized(SmallResNet()), settings())


def test_a_network_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 'conv1': preserve_zeros=True, but its weight is on the meta device"):
        bgd.plan(SmallResNet().to("meta"), settings())


def test_the_setting_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="preserve_zeros='2:4': give True or False"):
        settings(preserve_zeros="2:4")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks") / "net.safetensors"
    bgd.save(bgd.quantize(pruned(), images(), settings("em"), progress=False).model, path)
    return path


def _edited(file: Path, path: Path, edit: Any) -> Path:
    """A copy of a file after `edit(tensors, header)`."""
    with safetensors.safe_open(str(file), framework="pt") as content:
        header = json.loads(content.metadata()[METADATA_KEY])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
    edit(tensors, header)
    safetensors.torch.save_file(tensors, path, metadata={METADATA_KEY: json.dumps(header)})
    return path


def _pop(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del tensors["conv1.mask"]


def _shorten(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["conv1.mask"] = tensors["conv1.mask"][:-1]


def _spoil(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["conv1.mask"] = torch.full_like(tensors["conv1.mask"], 255)


def _widen(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["conv1.mask"] = tensors["conv1.mask"].to(torch.int32)


def _misname(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["masks"]["conv1"] = ["2:4"]


def _forget(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del header["masks"]["conv1"]


def _invent(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["masks"]["stem"] = "bits"


def _flatten(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["masks"] = ["conv1"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_pop, "'conv1.mask' is missing from the file"),
        (
            _shorten,
            r"'conv1.mask': the mask is damaged \(288 codes of 3 bits need uint8 \(108,\), found torch.uint8 \(107,\)",
        ),
        (_spoil, r"'conv1.mask': the mask is damaged \(pattern 7 is out of range: 2:4 has 6 patterns\)"),
        (_widen, "'conv1.mask': the mask is damaged"),
        (_misname, r"'conv1.mask': the mask is damaged \(.*is not a mask form\)"),
        (_forget, "'conv1.mask' is in the file; the network has no such state"),
        (_invent, "mask of 'stem' is in the file; it has no such quantized layer"),
        (_flatten, "'masks' in the header is damaged"),
    ],
)
def test_an_edited_mask_is_refused(file: Path, tmp_path: Path, edit: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        bgd.load(_edited(file, tmp_path / "edited.safetensors", edit), like=SmallResNet())


@pytest.mark.parametrize("edit", [_pop, _misname, _invent])
def test_inspect_refuses_or_shows_an_edited_mask(file: Path, tmp_path: Path, edit: Any) -> None:
    """What a damaged header says is shown as text, never run; a part that is missing is an error."""
    path = _edited(file, tmp_path / "edited.safetensors", edit)
    if edit is _pop:
        with pytest.raises(CheckpointError, match="the layers in its header are damaged"):
            inspected(path)
    else:
        assert inspected(path)["file_bytes"] == path.stat().st_size


def test_unedited_the_file_loads(file: Path, tmp_path: Path) -> None:
    copy = _edited(file, tmp_path / "copy.safetensors", lambda tensors, header: None)
    assert same_outputs(bgd.load(copy, like=SmallResNet()), bgd.load(file, like=SmallResNet()), images())


@pytest.mark.parametrize("bad", [0, 100, "1 MiB", 1e9])
def test_a_chain_that_grew_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"original_bytes=.*: the network has 16204 bytes"):
        bgd.plan(SmallResNet(), em(), original_bytes=bad)


def test_the_ratio_is_that_of_the_chain() -> None:
    model = SmallResNet().eval()
    plan = bgd.plan(model, em(), original_bytes=1_000_000)
    result = bgd.quantize(model, images(), em(), progress=False, original_bytes=1_000_000)
    assert plan.original_bytes == result.report.original_bytes == 1_000_000
    assert result.report.ratio == 1_000_000 / result.report.compressed_bytes
    by_pass = bgd.BGDPass(em(), images(), progress=False, original_bytes=1_000_000)
    by_pass(torch.fx.symbolic_trace(model))
    assert by_pass.report is not None
    assert by_pass.report.original_bytes == 1_000_000


def test_a_budget_counts_the_masks() -> None:
    model = pruned()
    config = settings(target_bytes=4400)
    plan = bgd.plan(model, config)
    result = bgd.quantize(model, images(), config, progress=False)
    assert result.report.compressed_bytes <= 4400
    assert sum(layer.mask_bytes for layer in plan.layers) > 0
    for layer in plan.layers:
        assert torch.equal(zeros(result.model, layer.name), zeros(model, layer.name))


def test_finetuning_leaves_the_zeros_of_float_layers() -> None:
    model = randomized(SmallResNet())
    with torch.no_grad():
        for layer in (model.stem, model.conv1):
            layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0.0
    zeros = model.stem.weight == 0
    finetuning = bgd.FinetuningConfig(steps=20, learning_rate=0.05)
    result = bgd.quantize(
        model, images(), bgd.BGDConfig(preserve_zeros=True, finetuning=finetuning, max_divergence=None), progress=False
    ).model
    assert not torch.equal(result.get_submodule("stem").weight, model.stem.weight)
    assert not result.get_submodule("stem").weight[zeros].any()
