"""Sums over processes: a second process with the same data changes nothing, since every mean stays what it is.

The processes are pretended: every sum comes back twice as large. `test_processes.py` starts real ones.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.files.format import file_bytes, stored
from bgd_plugin.fitting import method_full_gram as full_gram
from bgd_plugin.support import processes
from tests.networks import SmallResNet, em, images, randomized, vectors


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Call `start` on it, and from then on each sum over processes is that of two with the same values."""

    def twice_(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2

    def start() -> None:
        for name, module in list(sys.modules.items()):
            # rows are drawn by the number of the piece among those of all processes
            if name.startswith("bgd_plugin.") and name != "bgd_plugin.calibration.rows" and module is not processes:
                for attribute, value in list(vars(module).items()):
                    if value is processes.sum_:
                        monkeypatch.setattr(module, attribute, twice_)
                    elif value is processes.total:
                        monkeypatch.setattr(module, attribute, lambda number: 2 * float(number))

    monkeypatch.start = start  # type: ignore[attr-defined]
    yield monkeypatch


class _Untraced(nn.Module):
    """A norm behind a layer, and a branch that a trace does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.first(x)))
        return x if bool(x.sum() < 0) else self.last(x)


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1)
    )


_SMALL = LayerConfig(block_size=4, codebook_size=8)
CASES: dict[str, tuple[Any, list[Tensor], BGDConfig]] = {
    "full": (SmallResNet, images(size=12), BGDConfig(rounds=1, max_divergence=None)),
    "reestimated": (SmallResNet, images(size=12), BGDConfig(rounds=1, batchnorm="reestimate", max_divergence=None)),
    "pooled": (SmallResNet, images(size=12), em(batchnorm="matched")),
    "depthwise": (_depthwise, images(5), BGDConfig(rounds=1, max_divergence=None)),
    "no graph": (_Untraced, vectors(5), BGDConfig(rounds=1, first_layer=_SMALL, max_divergence=None)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_data_once_more_changes_nothing(case: str, twin: Any) -> None:
    build, data, config = CASES[case]
    model = randomized(build())
    twin.setattr(full_gram, "_DAMPING", 9.0)  # as much as there is, however many rows
    files, reports = [], []
    for _ in range(2):
        result = bgd.quantize(model, data, config, progress=False)
        files.append(file_bytes(stored(result.model)))
        reports.append(result.report)
        twin.start()
    assert files[0] == files[1]
    alone, both = reports
    assert both.layers == alone.layers and both.notes == alone.notes
    assert both.answers == dataclasses.replace(alone.answers, samples=2 * alone.answers.samples)
