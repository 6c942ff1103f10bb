"""A whole torchvision network, end to end, at a size that takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from tests.networks import images, randomized, same_outputs


def test_resnet18_from_float_to_file_and_back(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    model, data = randomized(models.resnet18(num_classes=10)), images(2, size=32, batch=2)
    rough = LayerConfig(block_size=18, codebook_size=16)
    config = BGDConfig(
        method="em",
        conv=rough,
        pointwise_conv=LayerConfig(block_size=4, codebook_size=16),
        em_iterations=2,
        max_divergence=None,
    )
    result = bgd.quantize(model, data, config, progress=False)
    assert len(result.report.layers) == 20
    notes = " ".join(result.report.notes)
    corrected = int(re.search(r"batch norm \(matched\): (\d+) corrected", notes)[1])  # type: ignore[index]
    undone = re.search(r"batch norm: undone, because it did harm on samples kept aside: ([\w., ]+)", notes)
    assert corrected + (len(undone[1].split(", ")) if undone else 0) == 20
    assert all(0 < layer.relative_error < 1 for layer in result.report.layers)
    written = bgd.save(result.model, tmp_path / "net")
    assert written == result.report.compressed_bytes == bgd.plan(model, config).compressed_bytes
    with torch.device("meta"):
        like = models.resnet18(num_classes=10).eval()
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=like), data)
    assert same_outputs(result.model, bgd.materialize(result.model), data)
