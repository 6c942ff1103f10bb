"""Which layers, which blocks, how many bytes, and why the others are left alone."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.errors import ConfigError
from tests.networks import ConvOfItsOwn, SmallResNet, TwiceNet, em

FC = {"resnet18": 2048, "resnet50": 1024}
KS = (256, 512, 1024, 2048)
TABLE = {
    ("resnet18", "small"): (1.541, 1.766, 2.027, 2.375),
    ("resnet18", "large"): (1.029, 1.215, 1.493, 1.854),
    ("resnet50", "small"): (5.091, 5.741, 6.475, 7.428),
    ("resnet50", "large"): (3.184, 3.665, 4.365, 5.252),
}


@pytest.fixture(scope="module")
def resnets() -> dict[str, nn.Module]:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        return {name: getattr(torchvision.models, name)() for name in FC}


def _paper(network: str, regime: Any, k: int = 256, **fields: Any) -> BGDConfig:
    pointwise = 8 if (network, regime) == ("resnet50", "large") else 4
    return BGDConfig.paper(
        regime, codebook_size=k, fc_codebook_size=FC[network], pointwise_block_size=pointwise, **fields
    )


@pytest.mark.parametrize(
    ("network", "regime", "k", "expected_mib"),
    [(*row, k, size) for row, sizes in TABLE.items() for k, size in zip(KS, sizes, strict=True)],
)
def test_the_papers_sizes(
    resnets: dict[str, nn.Module], network: str, regime: str, k: int, expected_mib: float
) -> None:
    plan = bgd.plan(resnets[network], _paper(network, regime, k))
    assert plan.paper_bytes / 2**20 == pytest.approx(expected_mib, rel=0.002 if k == 256 else 0.005)


def test_the_papers_semi_supervised_network(resnets: dict[str, nn.Module]) -> None:
    overrides = (("layer1.0.conv3", None), ("layer1.0.downsample.0", None))
    plan = bgd.plan(resnets["resnet50"], _paper("resnet50", "small", overrides=overrides))
    assert plan.paper_bytes / 2**20 == pytest.approx(5.20, rel=0.01)


def test_only_the_first_layer_of_a_resnet_stays_float(resnets: dict[str, nn.Module]) -> None:
    plan = bgd.plan(resnets["resnet18"], _paper("resnet18", "small"))
    assert [(s.name, s.reason) for s in plan.skipped] == [("conv1", "first_layer=None")]
    assert len(plan.layers) == 20


def test_original_bytes_count_parameters_and_buffers_once() -> None:
    model = TwiceNet()
    expected = 4 * (12 * 32 + 32 + 32 * 32 + 32 + 32 * 5 + 5)
    assert bgd.plan(model, em()).original_bytes == expected


def test_layers_come_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b, self.a = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    plan = bgd.plan(Backwards(), em(first_layer=LayerConfig(block_size=4)))
    assert [layer.name for layer in plan.layers] == ["a", "b", "c"]


def test_a_layers_numbers() -> None:
    layer = next(x for x in bgd.plan(SmallResNet(), em()).layers if x.name == "conv1")
    assert (layer.kind, layer.block_size, layer.codebook_size) == ("conv2d", 9, 16)
    assert (layer.rows, layer.blocks_per_row, layer.code_bits) == (16, 8, 4)
    assert layer.compressed_bytes == 16 * 8 * 4 // 8 + 2 * 16 * 9
    assert layer.bits_per_weight == pytest.approx(8 * layer.compressed_bytes / (16 * 72))


# --- settings


def test_the_first_glob_that_matches_wins() -> None:
    overrides = (("conv2", LayerConfig(block_size=18)), ("conv*", LayerConfig(block_size=8)))
    sizes = {layer.name: layer.block_size for layer in bgd.plan(SmallResNet(), em(overrides=overrides)).layers}
    assert (sizes["conv1"], sizes["conv2"], sizes["fc"]) == (8, 18, 4)


def test_an_override_of_none_keeps_a_layer_float_and_says_so() -> None:
    plan = bgd.plan(SmallResNet(), em(overrides=(("f*", None),)))
    assert {s.name: s.reason for s in plan.skipped}["fc"] == "override 'f*'"
    assert "fc" not in [layer.name for layer in plan.layers]


def test_an_override_reaches_the_first_layer() -> None:
    plan = bgd.plan(SmallResNet(), em(overrides=(("stem", LayerConfig(block_size=9, codebook_size=4)),)))
    assert plan.layers[0].name == "stem"


def test_a_glob_that_matches_nothing_is_an_error_with_the_names_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"override 'layer9\.\*' matches no layer; the network has stem, conv1, conv2"
    ):
        bgd.plan(SmallResNet(), em(overrides=(("layer9.*", None),)))


def test_a_default_block_size_gives_way_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 30))  # 30 is no multiple of 4
    (layer,) = bgd.plan(model, em()).layers
    assert layer.block_size == 3
    assert "block 4 → 3: 30 weights per row" in layer.note


@pytest.mark.parametrize(
    "fields", [{"linear": LayerConfig(block_size=8)}, {"overrides": (("1", LayerConfig(block_size=8)),)}]
)
def test_a_chosen_block_size_that_does_not_divide_is_an_error(fields: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 30))
    expected = (
        "layer '1': 30 weights per row do not divide into blocks of 8; use 6 or 10, "
        "or exclude the layer with an override ('1', None)"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        bgd.plan(model, em(**fields))


@settings(max_examples=40)
@given(rows=st.integers(1, 300), blocks_per_row=st.integers(1, 12), bits=st.integers(1, 12))
def test_codebooks_are_clamped_below_a_quarter_of_the_blocks(rows: int, blocks_per_row: int, bits: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4 * blocks_per_row, rows), nn.Linear(rows, 100))
    blocks, asked = rows * blocks_per_row, 2**bits
    allowed = [2**b for b in range(1, 13) if 4 * 2**b < blocks]
    config = em(first_layer=LayerConfig(block_size=4, codebook_size=asked), linear=LayerConfig(block_size=1))
    plan = bgd.plan(model, config)
    found = [layer for layer in plan.layers if layer.name == "0"]
    if allowed:
        assert found[0].codebook_size == min(asked, max(allowed))
        assert ("codebook" in found[0].note) == (found[0].codebook_size < asked)
    else:
        assert {s.name: s.reason for s in plan.skipped}["0"] == f"only {blocks} blocks, too few for a codebook"


# --- what is left alone


class _Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 1))


def test_depthwise_layers_stay_float_unless_set() -> None:
    assert {s.name: s.reason for s in bgd.plan(_Depthwise(), em()).skipped} == {
        "0": "first_layer=None",
        "1": "depthwise_conv=None",
    }
    plan = bgd.plan(_Depthwise(), em(depthwise_conv=LayerConfig(block_size=9, codebook_size=4)))
    assert {layer.name: layer.family for layer in plan.layers} == {"1": "depthwise_conv", "2": "pointwise_conv"}


def test_a_convolution_with_kernels_of_one_is_pointwise_in_any_dimension() -> None:
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.Conv1d(16, 16, 1), nn.Conv1d(16, 16, 3))
    assert [layer.family for layer in bgd.plan(model, em()).layers] == ["pointwise_conv", "conv"]


class _Odd(nn.Module):
    """One of each kind of weight that is not a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.first = nn.Linear(16, 16)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.tied = nn.Linear(16, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.table = nn.Parameter(torch.randn(10, 16))
        self.up = nn.ConvTranspose1d(16, 16, 1)
        self.unused = nn.Linear(16, 16)
        self.plain = nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.normed(self.first(self.embedding(x) + self.table))
        return self.plain(self.tied(self.up(y.mT).mT))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tied", "embedding=None (tied to embedding)"),
        ("table", "a plain tensor, used by add"),
        ("unused.weight", "not used in evaluation mode"),
    ],
)
def test_every_weight_that_is_left_alone_has_its_reason(name: str, reason: str) -> None:
    plan = bgd.plan(_Odd(), em())
    assert reason in {s.name: s.reason for s in plan.skipped}[name]
    assert [layer.name for layer in plan.layers] == ["first", "normed", "up", "plain"]


def test_a_weight_that_is_computed_is_left_alone() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.register_buffer("mask", torch.ones(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.linear(x, self.a.weight * self.mask))

    plan = bgd.plan(Masked(), em(first_layer=LayerConfig(block_size=4)))
    assert "linear" in {s.name for s in plan.skipped if "computed in the graph" in s.reason}
    assert [layer.name for layer in plan.layers] == ["b"]


def test_no_layer_at_all_says_why() -> None:
    with pytest.raises(ConfigError, match="no layer of the network can be quantized: it has no convolution"):
        bgd.plan(nn.Sequential(nn.ReLU()), em())
    with pytest.raises(ConfigError, match="no layer of the network can be quantized: 0: first_layer=None"):
        bgd.plan(nn.Sequential(nn.Linear(16, 16)), em())


# --- the plan itself


def test_a_plan_prints_every_layer_and_the_totals() -> None:
    plan = bgd.plan(SmallResNet(), em())
    text = str(plan)
    for name in ["conv1", "conv2", "down", "fc", "stem"]:
        assert re.search(rf"^{name} ", text, flags=re.MULTILINE), name
    assert f"4 layers quantized, 1 left float: {plan.original_bytes / 1024:.2f} KiB" in text


def test_a_plan_is_json() -> None:
    plan = bgd.plan(SmallResNet(), em())
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["ratio"] == plan.original_bytes / plan.compressed_bytes
    assert values["layers"][0]["name"] == "conv1"


def test_a_network_on_the_meta_device_has_the_same_layers() -> None:
    with torch.device("meta"):
        empty = SmallResNet()
    assert bgd.plan(empty, em()).layers == bgd.plan(SmallResNet(), em()).layers


def test_a_subclass_with_a_forward_of_its_own_goes_by_its_own_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ConvOfItsOwn(8, 16, 3))
    (layer,) = bgd.plan(model, em()).layers
    assert (layer.name, layer.kind, layer.weight_shape) == ("1", "conv2d", (16, 8, 3, 3))


def test_memory_is_that_of_the_compressed_network_with_a_shared_weight_once() -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.BatchNorm1d(32))
    model[2].weight = model[1].weight
    plan = bgd.plan(model.eval(), em())
    assert [layer.name for layer in plan.layers] == ["1"]
    assert plan.memory_bytes == bgd.quantize_weights(model, em()).report.memory_bytes


def test_a_budget_without_data_shows_progress_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    model, config = SmallResNet(), BGDConfig(target_ratio=3)
    loud = bgd.plan(model, config)
    shown = capsys.readouterr().err
    assert bgd.plan(model, config, progress=False).layers == loud.layers
    assert shown.count("estimate: 100%") == 1 and "4/4" in shown
    assert capsys.readouterr().err == ""
