"""The last bytes of a budget: the last entropy-coded layer takes what is left, and gives back what is too much."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig
from bgd_plugin.encoding.stream import coded_bytes
from bgd_plugin.files.content import measured_size
from bgd_plugin.fitting import FittedLayer
from bgd_plugin.graph import front_end
from bgd_plugin.nn import quantized
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.quantization import spending
from bgd_plugin.quantization.spending import shorten_, with_the_rest
from tests.networks import images, randomized

# One worker of pytest-xdist runs them, so that the network is quantized once.
pytestmark = pytest.mark.xdist_group("spending")

DATA = images(8, size=8)
BUDGET = BGDConfig(codes="entropy", target_bytes=9000, freeze_norms=True, rounds=1)


class Net(nn.Module):
    """A stem, a depthwise and a pointwise convolution with norms, and a head that is most of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.norm1 = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.point, self.norm2 = nn.Conv2d(24, 96, 1, bias=False), nn.BatchNorm2d(96)
        self.head = nn.Linear(96, 200)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.depthwise(torch.relu(self.norm0(self.stem(x))))))
        x = torch.relu(self.norm2(self.point(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def _net() -> Net:
    torch.manual_seed(0)
    return randomized(Net())


@pytest.fixture(scope="module")
def found() -> Any:
    return bgd.quantize(_net(), DATA, BUDGET, progress=False)


def test_the_budget_is_spent_to_the_end(found: Any, tmp_path: Path) -> None:
    size = bgd.save(found.model, tmp_path / "net")
    assert size == found.report.compressed_bytes
    assert 0.98 * 9000 < size <= 9000


@pytest.mark.parametrize("target", [6500, 14_000])
def test_other_budgets_are_spent_too(target: int) -> None:
    config = dataclasses.replace(BUDGET, target_bytes=target)
    size = bgd.quantize(_net(), DATA, config, progress=False).report.compressed_bytes
    assert 0.97 * target < size <= target


def _survey(config: BGDConfig, **sizes: int) -> tuple[Survey, nn.Module]:
    """A survey in which some layers are to be entropy coded, in so many bytes."""
    net = _net()
    survey = surveyed(front_end(net), config, original=net)

    def coded(planned: PlannedLayer) -> PlannedLayer:
        size = sizes.get(planned.name)
        if size is None:
            return planned
        return dataclasses.replace(planned, codes="entropy", block_size=1, codebook_size=256, size_bytes=size)

    chosen = tuple((layer, coded(planned)) for layer, planned in survey.chosen)
    return dataclasses.replace(survey, chosen=chosen), survey.network


@pytest.mark.parametrize(
    ("config", "sizes", "name"),
    [
        (BUDGET, {"point": 700, "head": 5000}, "point"),  # not the last one
        (BUDGET, {}, "head"),  # of blocks
        (BGDConfig(codes="entropy", max_divergence=0.1), {"head": 5000}, "head"),  # no budget in bytes
    ],
)
def test_other_layers_stay_as_planned(config: BGDConfig, sizes: dict[str, int], name: str) -> None:
    survey, network = _survey(config, **sizes)
    index = [planned.name for planned in survey.layers].index(name)
    assert with_the_rest(survey, network, index) == survey.layers[index]


@pytest.mark.parametrize("more", [0, 1000])
def test_each_byte_of_the_budget_goes_to_the_last_one(more: int) -> None:
    config = dataclasses.replace(BUDGET, target_bytes=9000 + more)
    survey, network = _survey(config, point=700, head=5000)
    length = spending._length(survey, network)
    last = with_the_rest(survey, network, 1)
    assert last.size_bytes == 5000 + (9000 + more - length) - 48


def test_a_length_counts_layers_to_come_as_planned() -> None:
    shorter, longer = (spending._length(*_survey(BUDGET, point=700, head=size)) for size in (5000, 5777))
    assert abs(longer - shorter - 777) <= 8  # a number more in the deflated header


def test_the_last_one_keeps_half_its_bytes() -> None:
    survey, network = _survey(dataclasses.replace(BUDGET, target_bytes=3000), point=700, head=5000)
    assert with_the_rest(survey, network, 1).size_bytes == 2500


def test_a_file_that_is_too_long_gets_coarser_codes(found: Any) -> None:
    survey, _ = _survey(BUDGET, point=700, head=5000)
    network = copy.deepcopy(found.model)
    exact, before = _net().head.weight.detach(), network.head.weight.detach()
    target = measured_size(network) - 300
    assert shorten_(survey, network, target) == ["head"]
    assert 0.85 * target < measured_size(network) <= target
    after = network.head.weight.detach()
    error, coarser = (float((weight - exact).square().mean()) for weight in (before, after))
    assert error < coarser < 1.5 * error
    assert shorten_(survey, network, target) == []


def test_quantize_shortens_a_file_that_came_out_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last layer had been given too much."""
    rest = with_the_rest

    def generous(*arguments: Any) -> PlannedLayer:
        planned = rest(*arguments)
        return dataclasses.replace(planned, size_bytes=planned.size_bytes + 700)

    monkeypatch.setattr("bgd_plugin.quantization.layer.with_the_rest", generous)
    report = bgd.quantize(_net(), DATA, BUDGET, progress=False).report
    assert report.compressed_bytes <= 9000
    assert any(note.startswith("budget: codes fitted again, to fewer bytes") for note in report.notes)


def test_only_streams_get_coarser(found: Any) -> None:
    """However long the file still is: the codes of blocks stay."""
    survey, _ = _survey(BUDGET, head=5000)
    network = copy.deepcopy(found.model)
    codes = network.point.codes.clone()
    assert [planned.name for planned in survey.layers] == ["point", "head"]
    assert shorten_(survey, network, 10) == ["head"]
    assert torch.equal(network.point.codes, codes)


class _Streams(nn.Module):
    """Compressed linear layers, two of which are tied."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(6):
            layer = nn.Linear(8, 8, bias=False)
            codes = torch.randint(0, 16, (8, 8), dtype=torch.uint8)
            module = quantized(layer, torch.randn(16, 1), codes)
            module.codebook.requires_grad_(number % 2 == 0)
            self.add_module(f"layer{number}", module)
        self.tied = copy.deepcopy(self.layer0)
        self.tied.codebook, self.tied.codes = self.layer0.codebook, self.layer0.codes


def _plans(sizes: list[int]) -> Any:
    common: dict[str, Any] = {"kind": "linear", "family": "linear", "weight_shape": (8, 8), "calls": ()}
    coded: dict[str, Any] = {"block_size": 1, "codebook_size": 16, "codes": "entropy"}
    plans = [
        PlannedLayer(name=f"named {number}", target=f"layer{number}", size_bytes=size, **common, **coded)
        for number, size in enumerate(sizes)
    ]
    return SimpleNamespace(layers=plans)


def test_the_largest_streams_are_fitted_again_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at most, each to as much less as the file is too long by, or half; the last one that is needed ends it."""
    network, asked = _Streams(), list[tuple[str, int]]()

    def coarser(layer: Any, planned: PlannedLayer) -> FittedLayer:
        asked.append((planned.name, planned.size_bytes))
        return FittedLayer(codebook=layer.codebook + 1, codes=layer.codes)

    monkeypatch.setattr(spending, "_coarser", coarser)
    monkeypatch.setattr(spending, "measured_size", lambda network: 1100)
    survey = _plans([50, 20, 60, 10, 40, 30])
    largest = ["named 2", "named 0", "named 4", "named 5"]
    assert shorten_(survey, network, 1000) == largest
    size = coded_bytes(network.layer2.codes, 16) + 16
    assert [name for name, _ in asked] == largest and asked[0][1] == size // 2
    lengths = iter([1001, 1000])
    monkeypatch.setattr(spending, "measured_size", lambda network: next(lengths))
    monkeypatch.setattr(spending, "_RESERVE_BYTES", 3)
    asked.clear()
    assert shorten_(survey, network, 1000) == ["named 2"]
    assert asked == [("named 2", size - 1 - 3)]


def test_layers_that_share_a_codebook_get_the_same_new_one() -> None:
    network = _Streams()
    before = {name: (m.codebook, m.codes) for name, m in network.named_children()}
    fit = FittedLayer(codebook=torch.zeros(4, 1, dtype=torch.float64), codes=torch.ones(8, 8, dtype=torch.int64))
    for number, name in ((0, "layer0"), (1, "layer1")):
        spending._put_(network, network.get_submodule(name), fit)  # type: ignore[arg-type]
        layer: Any = network.get_submodule(name)
        assert torch.equal(layer.codebook, torch.zeros(4, 1)) and layer.codebook.dtype == torch.float32
        assert torch.equal(layer.codes, torch.ones(8, 8)) and layer.codes.dtype == torch.uint8
        assert layer.codebook.requires_grad == (number == 0)
    assert network.tied.codebook is network.layer0.codebook and network.tied.codes is network.layer0.codes  # type: ignore[union-attr]
    for name in ("layer2", "layer3", "layer4", "layer5"):
        other: Any = network.get_submodule(name)
        assert other.codebook is before[name][0] and other.codes is before[name][1]


def test_measuring_a_length_copies_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    survey, network = _survey(BUDGET, point=700, head=5000)
    real, shares = spending.copy_module, list[bool]()

    def watched(module: nn.Module, **settings: Any) -> Any:
        copied = real(module, **settings)
        pairs = zip(copied.parameters(), module.parameters(), strict=True)
        shares.append(all(one.data_ptr() == other.data_ptr() for one, other in pairs))
        return copied

    monkeypatch.setattr(spending, "copy_module", watched)
    spending._length(survey, network)
    assert shares == [True]
