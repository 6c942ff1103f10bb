"""The shortest way through the library, on one small network: quantize, save, load, materialize."""

from __future__ import annotations

from pathlib import Path

import bgd_plugin as bgd
from tests.networks import SmallResNet, images, randomized, same_outputs


def test_there_and_back(tmp_path: Path) -> None:
    data = images()
    result = bgd.quantize(randomized(SmallResNet()), data, bgd.BGDConfig(max_divergence=None), progress=False)
    assert bgd.save(result.model, tmp_path / "net.safetensors") == result.report.compressed_bytes
    again = bgd.load(tmp_path / "net.safetensors", like=SmallResNet().eval())
    assert same_outputs(again, result.model, data)
    dense = bgd.materialize(again)
    assert (dense(data[0]) - again(data[0])).abs().max() < 1e-4
