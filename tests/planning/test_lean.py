"""Which depthwise weights become small integers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin import BGDConfig
from bgd_plugin.encoding.significant import round_to_bits
from bgd_plugin.graph import front_end
from bgd_plugin.nn import freeze_norms_
from bgd_plugin.planning.lean import coarse_weights, freeze_lean_norms_
from bgd_plugin.planning.survey import surveyed
from tests.networks import images, randomized

LEAN = BGDConfig(codes="entropy", target_ratio=5.0)


class Net(nn.Module):
    """Depthwise convolutions: before a norm, with a bias, before an activation, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.plain, self.norm = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.biased, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16)
        self.bare = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.twice, self.norm3 = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm2(self.biased(torch.relu(self.norm(self.plain(self.stem(x))))))
        x = self.norm3(self.twice(torch.relu(self.twice(torch.relu(self.bare(x))))))
        result: torch.Tensor = self.head(x)
        return result


class Padding(nn.Conv2d):
    """Pads by itself, so that a graph has a plain convolution of a weight; `twice` reads the weight a second time."""

    twice = False
    shift: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        def call(x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(functional.pad(x, (1, 1, 1, 1)), self.weight, self.shift, groups=self.groups)

        return call(torch.relu(call(input))) if self.twice else call(input)


class Plain(nn.Module):
    """Such convolutions before norms: one that reads its weight once, one that does twice, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.once, self.norm = Padding(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16)
        self.twice, self.norm2 = Padding(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16)
        self.biased, self.norm3 = Padding(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16)
        self.twice.twice, self.biased.shift = True, torch.ones(16)
        self.head = nn.Conv2d(16, 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm2(self.twice(torch.relu(self.norm(self.once(self.stem(x)))))))
        result: torch.Tensor = self.head(self.norm3(self.biased(x)))
        return result


def _coarse(config: BGDConfig, kind: type[nn.Module] = Net) -> dict[str, tuple[str, str]]:
    net = randomized(kind())
    return coarse_weights(surveyed(front_end(net), config, original=net))


def test_only_weights_whose_scale_a_norm_takes_up_become_small_integers() -> None:
    assert {name: norm for name, (_, norm) in _coarse(LEAN).items()} == {"plain.weight": "norm"}


def test_plain_calls_in_a_graph_count_as_convolutions() -> None:
    """EfficientNet's do: their class pads by itself."""
    assert {name: norm for name, (_, norm) in _coarse(LEAN, Plain).items()} == {"once.weight": "norm"}


def test_their_weights_are_small_integers_in_the_compressed_network() -> None:
    net, data = randomized(Plain()), images(8, size=8)
    found = bgd.quantize(net, data, LEAN, progress=False)
    weight = found.model.once.weight.detach()
    step = weight[weight != 0].abs().min()
    assert float((weight / step).abs().max()) <= 15
    assert torch.equal((weight / step).round(), weight / step)
    with torch.no_grad():
        before, after = (torch.relu(m.norm(m.once(m.stem(data[0])))) for m in (net, found.model))
    assert float((after - before).square().mean()) < 0.02 * float(before.var())


def test_five_bits_on_demand_suit_blocks_too() -> None:
    config = dataclasses.replace(LEAN, codes="blocks", weight_storage="int5")
    assert _coarse(config) == _coarse(LEAN)


@pytest.mark.parametrize(
    ("fields", "bits"),
    [({}, 7), ({"float_storage": "float32"}, 24), ({"codes": "blocks"}, 24), ({"weight_storage": "float16"}, 24)],
)
def test_frozen_norms_keep_seven_significant_bits_where_settings_are_lean(fields: dict[str, str], bits: int) -> None:
    norms = nn.Sequential(nn.BatchNorm2d(40), nn.BatchNorm1d(30))
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_var.uniform_(0.1, 10)
    found, exact = copy.deepcopy(norms).eval(), copy.deepcopy(norms).eval()
    freeze_lean_norms_(found, dataclasses.replace(LEAN, freeze_norms=True, **fields))  # type: ignore[arg-type]
    freeze_norms_(exact)
    for mine, theirs in zip(found.parameters(), exact.parameters(), strict=True):
        assert torch.equal(mine, round_to_bits(theirs, bits))


def test_norms_that_are_not_frozen_stay() -> None:
    norms = nn.Sequential(nn.BatchNorm2d(4))
    freeze_lean_norms_(norms, LEAN)
    assert isinstance(norms[0], nn.BatchNorm2d)


@pytest.mark.parametrize("fields", [{"codes": "blocks"}, {"weight_storage": "float16"}, {"weight_storage": "float32"}])
def test_other_settings_leave_the_weights_as_they_say(fields: dict[str, str]) -> None:
    assert _coarse(dataclasses.replace(LEAN, **fields)) == {}  # type: ignore[arg-type]
