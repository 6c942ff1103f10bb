"""A budget for a network that is no graph: what is measured, that the file keeps to it, and what that costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import find_layers, front_end
from bgd_plugin.planning import samples as samples_module
from bgd_plugin.planning import sensitivity
from tests.calibration.test_rerun import WIDTH, Block, Products, Routed, data, untraceable
from tests.networks import randomized


class Chain(nn.Module):
    """Blocks of which the last one matters a hundred times as much as the others."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        untraceable(x)
        for block in self.blocks:
            x = x + 0.1 * (block(x) - x)
        return self.head(x)


class Unreached(nn.Module):
    """A large layer that no calibration input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.never, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, 64), nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if float(x.detach().sum()) < 0:
            x = self.never(x)
        return self.head(x)


def test_what_counts_more_gets_more_bits() -> None:
    result = bgd.quantize(randomized(Chain()), data(), bgd.BGDConfig(target_ratio=4, rounds=1), progress=False)
    bits = {layer.name: layer.bits_per_weight for layer in result.report.layers}
    assert not any("weights alone" in note for note in result.report.notes)
    in_blocks = [bits.get(f"blocks.{n}.{name}", 32) for n in range(3) for name in ("a", "b", "c", "out")]
    assert bits.get("head", 32) > sum(in_blocks) / len(in_blocks)


@pytest.mark.parametrize("build", [Chain, Unreached, Routed])
@pytest.mark.parametrize("ratio", [2.5, 3.0])
def test_the_file_keeps_to_the_budget(build: type[nn.Module], ratio: float, tmp_path: Path) -> None:
    network = randomized(build())
    result = bgd.quantize(network, data()[:1], bgd.BGDConfig(target_ratio=ratio, rounds=1), progress=False)
    size = bgd.save(result.model, tmp_path / "n")
    assert size == result.report.compressed_bytes
    assert size * ratio <= result.report.original_bytes


def test_a_layer_out_of_reach_is_said_to_be_fitted_to_its_weight() -> None:
    network = randomized(Unreached())
    within = bgd.quantize(network, data(), bgd.BGDConfig(target_ratio=6), progress=False).report
    row = next(layer for layer in within.layers if layer.name == "never")
    assert 0 < row.relative_error < 0.5
    assert "no calibration input reaches it" in str(within)
    without = bgd.quantize(network, data(), bgd.BGDConfig(max_divergence=None), progress=False).report
    assert [s.name for s in without.skipped if "reaches" in s.reason] == ["never"]


def test_measuring_takes_a_few_runs_however_many_layers_there_are() -> None:
    forwards, config = [], bgd.BGDConfig(linear=bgd.LayerConfig(block_size=8))  # fewer trials of sizes, which count too
    for depth in (3, 8):
        network = randomized(Chain(depth))
        batches = [batch.repeat(8, 1) for batch in data()]
        with Products() as once, torch.no_grad():
            for batch in batches:
                network(batch)
        with Products() as counted:
            bgd.plan(network, dataclasses.replace(config, target_ratio=2 if depth == 3 else 4), batches, progress=False)
        forwards.append(counted.multiplications / once.multiplications)
    assert forwards[1] < 1.5 * forwards[0]


class _Enough(Exception):
    """What was wanted has been seen."""


class _Many(nn.Module):
    """Layers in a row, and a branch that no trace follows."""

    def __init__(self, count: int, *, is_traceable: bool) -> None:
        super().__init__()
        self.layers, self.is_traceable = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count))), is_traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_traceable:
            untraceable(x)
        return self.layers(x)


@pytest.mark.parametrize(
    ("count", "samples", "is_traceable", "expected"),
    [(30, 100, True, 16), (30, 100, False, 16), (60, 20, False, 4), (60, 4, False, 1), (2, 2, False, 12)],
)
def test_the_fewer_samples_the_more_layers_are_run_to_the_end(
    count: int, samples: int, is_traceable: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph 16; without one as many as come to six runs over all samples, each counted twice."""

    def asked(batches: Any, number: int) -> Any:
        assert number == expected
        raise _Enough

    monkeypatch.setattr(samples_module, "first_samples", asked)
    model = _Many(count, is_traceable=is_traceable).eval()
    network = front_end(model).network
    layers = find_layers(network)[0]
    assert len(layers) == count and isinstance(network, fx.GraphModule) == is_traceable
    batches = collect_batches([torch.randn(samples, 8)], model, device=torch.device("cpu"), forward=None)
    with pytest.raises(_Enough):
        sensitivity.measure_layers(network, batches, layers, bgd.BGDConfig(), lambda: None)
