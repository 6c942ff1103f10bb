"""Block-wise reconstruction of a network that is no graph."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from tests.calibration.test_rerun import Aside, Chain, EncoderDecoder, Routed, data
from tests.networks import randomized

CONFIG = bgd.BGDConfig(
    reconstruction=bgd.ReconstructionConfig(steps=120, batch_size=8),
    linear=bgd.LayerConfig(block_size=8),
    max_divergence=None,
)


def losses(report: bgd.results.Report) -> tuple[int, float, float]:
    note = next(note for note in report.notes if note.startswith("reconstruction"))
    found = re.search(r"(\d+) blocks, mean loss on held-out samples ([\d.e-]+) → ([\d.e-]+)", note)
    assert found
    return int(found[1]), float(found[2]), float(found[3])


@pytest.mark.parametrize(("build", "blocks"), [(Chain, 3), (EncoderDecoder, 3), (Routed, 3)])
def test_blocks_are_trained_to_the_float_blocks_outputs(build: type[nn.Module], blocks: int, tmp_path: Path) -> None:
    torch.manual_seed(3)  # of some routed networks no block gains anything
    network = randomized(build())
    before = {name: p.clone() for name, p in network.named_parameters()}
    result = bgd.quantize(network, data(), CONFIG, progress=False)
    count, first, last = losses(result.report)
    assert count >= blocks
    assert last < (1 if build is Routed else 0.98) * first
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert bgd.save(result.model, tmp_path / "n") == result.report.compressed_bytes
    if build is Routed:
        again = bgd.quantize(network, data(), CONFIG, progress=False)
        one, other = result.model.state_dict(), again.model.state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_networks_answer_more_nearly_as_before() -> None:
    """In the sum over three: the fit makes good most of what reconstruction could, and a single one may lose."""
    plain = bgd.BGDConfig(linear=bgd.LayerConfig(block_size=8), max_divergence=None)
    errors = {plain: 0.0, CONFIG: 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        network = randomized(Chain(4))
        for config in errors:
            model = bgd.quantize(network, data(), config, progress=False).model
            with torch.no_grad():
                errors[config] += sum(float((model(x) - network(x)).square().sum()) for x in data())
    assert errors[CONFIG] < errors[plain]


def test_a_network_whose_modules_pass_on_more_than_they_return_is_not_trained_on_wrong_values() -> None:
    result = bgd.quantize(randomized(Aside()), data(), CONFIG, progress=False)
    assert losses(result.report)[0] == 2  # the two before the layer that reads the value which is left aside
