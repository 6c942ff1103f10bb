"""What goes wrong says which layer, what was found, and what to do; files have theirs in `test_checkpoint`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import DistillationConfig, FinetuningConfig, LayerConfig
from bgd_plugin.errors import CalibrationError, ConfigError, TraceError
from bgd_plugin.graph import trace
from tests.networks import PlainNet, SmallResNet, em, images, randomized, same_outputs, vectors


def _quantize(model: nn.Module, data: Any, config: Any = None, **options: Any) -> bgd.results.Quantized:
    return bgd.quantize(model, data, config or em(), progress=False, **options)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_tracing_names_the_part_that_does_not_trace_with_a_way_out() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.ReLU(), _Branching()))
    with pytest.raises(TraceError, match=r"submodule '1\.1' \(_Branching\) raises .*Quantize the parts that do trace"):
        trace(model)


def test_a_block_size_that_does_not_divide() -> None:
    expected = "layer 'conv1': 72 weights per row do not divide into blocks of 7; use 6 or 8, or exclude the layer"
    with pytest.raises(ConfigError, match=expected):
        _quantize(SmallResNet(), images(), em(conv=LayerConfig(block_size=7)))


def test_a_glob_that_matches_nothing() -> None:
    with pytest.raises(
        ConfigError, match="override 'layer9' matches no layer; the network has stem, conv1, conv2, down"
    ):
        _quantize(SmallResNet(), images(), em(overrides=(("layer9", None),)))


def test_no_layer_at_all_to_quantize() -> None:
    with pytest.raises(ConfigError, match="no layer of the network can be quantized: it has no convolution"):
        _quantize(nn.Sequential(nn.ReLU()), vectors())
    with pytest.raises(ConfigError, match=r"no layer of the network can be quantized: .*fc: linear=None"):
        _quantize(SmallResNet(), images(), em(conv=None, pointwise_conv=None, linear=None))


def test_empty_calibration() -> None:
    with pytest.raises(CalibrationError, match="the calibration data is empty: give an iterable of batches"):
        _quantize(PlainNet(), [])


def test_one_shot_calibration_where_it_is_walked_twice() -> None:
    expected = "can be iterated over only once, but finetuning needs it again: give a DataLoader or a list of batches"
    with pytest.raises(CalibrationError, match=expected):
        _quantize(PlainNet(), (x for x in vectors()), em(finetuning=FinetuningConfig(steps=1)))


@pytest.mark.parametrize("data", [["text"], [3], [object()], [{}]])
def test_a_batch_of_the_wrong_form(data: list[Any]) -> None:
    with pytest.raises(CalibrationError, match=r"calibration batch 0 is a \w+: give a tensor, .* forward=callable"):
        _quantize(PlainNet(), data)


def test_a_batch_of_the_wrong_shape_names_the_layer() -> None:
    expected = r"the network fails on a calibration batch, at layer '0': mat1 and mat2 shapes"
    with pytest.raises(CalibrationError, match=expected):
        _quantize(PlainNet(), vectors(features=7))


def test_a_batch_of_the_wrong_shape_at_a_quantized_layer_names_the_layer() -> None:
    config = em(first_layer=LayerConfig(block_size=9))
    with pytest.raises(CalibrationError, match="stem"):
        _quantize(SmallResNet(), images(channels=4), config)


def test_a_mapping_with_other_names() -> None:
    with pytest.raises(
        CalibrationError, match=r"batch 0 gives pixels; PlainNet\.forward takes input .*forward=callable"
    ):
        _quantize(PlainNet(), [{"pixels": vectors()[0]}])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = SmallResNet()
    model.conv2.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(ConfigError, match=r"'conv2\.weight' of the network contains NaN or infinite values: repair"):
        _quantize(model, images())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_calibration_data_that_is_not_finite_names_the_layer_it_reaches(bad: float) -> None:
    data = vectors()
    data[1][0, 0] = bad
    expected = r"layer '2': its inputs on the calibration data contain NaN or infinite values.*check the data"
    with pytest.raises(CalibrationError, match=expected):
        _quantize(nn.Sequential(nn.Linear(12, 32), nn.Identity(), nn.Linear(32, 32)), data)


def test_activations_that_overflow_name_the_layer() -> None:
    model = PlainNet()
    model[0].weight.data.fill_(3e38)
    with pytest.raises(CalibrationError, match="layer '2': its inputs on the calibration data contain NaN or infinite"):
        _quantize(model, vectors())


def test_all_zero_activations_are_quantized_by_their_weights() -> None:
    model = PlainNet()
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1.0)
    result = _quantize(model, vectors())
    lost = (result.model.get_submodule("2").weight - model[2].weight).square().sum() / model[2].weight.square().sum()
    assert lost.item() < 0.9
    assert result.report.layers[0].relative_error == 0


def test_fewer_blocks_than_codewords_get_a_smaller_codebook_and_a_note() -> None:
    result = _quantize(PlainNet(), vectors(), em(linear=LayerConfig(block_size=4, codebook_size=4096)))
    layer = result.report.layers[0]
    assert (layer.codebook_size, layer.note) == (32, "codebook 4096 → 32: 256 blocks")


def test_fewer_distinct_blocks_than_codewords_end() -> None:
    model = PlainNet()
    model[2].weight.data = torch.tensor([1.0, -2.0, 0.5, 0.25]).repeat(32, 8)
    result = _quantize(model, vectors())
    assert torch.equal(result.model.get_submodule("2").weight, model[2].weight)


def test_weights_of_zero_stay_zero() -> None:
    model = PlainNet()
    model[2].weight.data.zero_()
    assert not _quantize(model, vectors()).model.get_submodule("2").weight.any()


@pytest.mark.parametrize("step", ["distillation", "finetuning"])
def test_a_teacher_with_other_outputs(step: str) -> None:
    fields: dict[str, Any] = {"distillation": DistillationConfig(steps=1), "finetuning": FinetuningConfig(steps=1)}
    expected = r"the teacher's logits have shape \[8, 7\], the network's \[8, 5\]: give a teacher with"
    with pytest.raises(CalibrationError, match=expected):
        _quantize(PlainNet(), vectors(), em(**{step: fields[step]}), teacher=PlainNet(classes=7))


def test_a_network_without_logits_where_training_needs_them() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = PlainNet()

        def forward(self, x: Tensor) -> Any:
            return {"boxes": self.net(x)}

    assert _quantize(Boxes(), vectors()).report.layers
    with pytest.raises(CalibrationError, match=r"the network returns a dict without logits: .*set distillation=None"):
        _quantize(Boxes(), vectors(), em(distillation=DistillationConfig(steps=1)))


def test_a_network_on_the_meta_device_can_only_be_planned() -> None:
    with torch.device("meta"):
        model = PlainNet()
    with pytest.raises(
        ConfigError, match=r"'0\.weight' is on the meta device and has no values: .*planned, but not quantized"
    ):
        _quantize(model, vectors())


def test_a_weight_that_a_hook_of_ones_own_computes_says_to_bake_it_first() -> None:
    model = PlainNet().eval()
    stored = nn.Parameter(model[2].weight.detach() / 2)
    del model[2]._parameters["weight"]
    model[2].register_parameter("stored", stored)
    model[2].register_forward_pre_hook(lambda module, _: setattr(module, "weight", 2 * module.stored.detach()))
    result = _quantize(model, vectors())
    assert {s.name: s.reason for s in result.report.skipped}["2"].endswith("bake it first")


def test_training_that_diverges_names_the_layer() -> None:
    config = em(distillation=DistillationConfig(steps=20, learning_rate=1e30))
    with pytest.raises(CalibrationError, match=r"distillation of layer '2': the loss is \w+; lower learning_rate"):
        _quantize(PlainNet(), vectors(), config)


def test_a_failed_call_leaves_nothing_half_done_in_its_folder(tmp_path: Path) -> None:
    data = vectors()
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32), nn.Threshold(-1e9, math.nan), nn.Linear(32, 32))
    model[1].bias.data[0] = -1e10
    with pytest.raises(CalibrationError, match="layer '3'"):
        _quantize(model, data, checkpoint=tmp_path)
    assert sorted(re.sub(r"\d+", "N", p.name) for p in tmp_path.iterdir()) == ["layer-N.safetensors", "run.json"]


def test_every_error_of_ours_has_one_root() -> None:
    for kind in (ConfigError, CalibrationError, TraceError, bgd.errors.CheckpointError):
        assert issubclass(kind, bgd.BGDError)


def test_a_healthy_network_raises_nothing() -> None:
    assert len(_quantize(randomized(SmallResNet()), images()).report.layers) == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_scripted_network_says_what_to_give() -> None:
    scripted = torch.jit.script(PlainNet())
    for call in (lambda: bgd.plan(scripted, em()), lambda: _quantize(scripted, vectors())):
        with pytest.raises(ConfigError, match=r"the network is scripted .* give the network as it was before"):
            call()


def test_what_is_no_network_at_all() -> None:
    with pytest.raises(ConfigError, match=r"the network is a dict: give a torch\.nn\.Module"):
        bgd.plan(dict(PlainNet().state_dict()), em())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_network_is_taken_out(wrap: Any) -> None:
    model = PlainNet()
    plain, wrapped = (_quantize(net, vectors()).model for net in (model, wrap(model)))
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    assert same_outputs(plain, wrapped, vectors())


def test_a_network_on_the_meta_device_is_planned_only() -> None:
    with torch.device("meta"):
        model = PlainNet()
    assert bgd.plan(model, em()).layers
    with pytest.raises(ConfigError, match="on the meta device and has no values: such a network can be planned"):
        _quantize(model, vectors())


def test_frozen_parameters_stay_frozen() -> None:
    result = _quantize(PlainNet().requires_grad_(False), vectors()).model
    assert not any(p.requires_grad for p in result.parameters())
