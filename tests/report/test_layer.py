"""What a fit finds out stands in the layer's row of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from tests.networks import em, randomized, vectors


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.second = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _few_blocks() -> nn.Module:
    """The second layer has three distinct blocks for its 32 codewords."""
    model = randomized(_Two())
    with torch.no_grad():
        blocks = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        model.second.weight.copy_(blocks[torch.arange(512) % 3].reshape(64, 32))
    return model


def _config(method: Any) -> BGDConfig:
    setting = LayerConfig(block_size=4, codebook_size=32)
    return em(linear=setting, first_layer=None) if method == "em" else BGDConfig(linear=setting, first_layer=None)


def _note(report: Any) -> str:
    (row,) = [x for x in report.layers if x.name == "second"]
    assert row.note in str(report) and row.note in report.to_json()
    return str(row.note)


@pytest.mark.parametrize("method", ["em", "full"])
def test_unused_codewords(method: str) -> None:
    result = bgd.quantize(_few_blocks(), vectors(), _config(method), progress=False)
    used = len(result.model.second.codes.unique())  # type: ignore[union-attr]
    assert used < 32
    assert f"{32 - used} of 32 codewords are not used" in _note(result.report)


def test_unused_codewords_without_data() -> None:
    assert "29 of 32 codewords are not used" in _note(bgd.quantize_weights(_few_blocks(), _config("em")).report)


def test_constant_input_columns() -> None:
    model = randomized(_Two())
    with torch.no_grad():
        model.first.weight[5:9] = 0  # four inputs of the second layer are tanh of a bias
        model.first.bias[5] = 0
    note = _note(bgd.quantize(model, vectors(), _config("full"), progress=False).report)
    assert "4 of 32 input columns are constant" in note


def test_a_sound_fit_has_no_warning() -> None:
    report = bgd.quantize(randomized(_Two()), vectors(batches=40), _config("full"), progress=False).report
    assert "codewords" not in _note(report) and "constant" not in _note(report)


def test_a_round_that_was_taken_back() -> None:
    """Few inputs and many rounds: the fit goes on on rows it has seen, and those kept aside say stop."""
    model = randomized(nn.Sequential(nn.Linear(64, 128)))
    config = BGDConfig(linear=LayerConfig(block_size=4, codebook_size=64), first_layer=LayerConfig(block_size=4))
    data = list(torch.randn(10, 4, 64, generator=torch.Generator().manual_seed(0)))
    report = bgd.quantize(model, data, config, progress=False).report
    assert "later steps raised the error on held-out inputs" in report.layers[0].note


def test_warnings_survive_a_resumed_run(tmp_path: Path) -> None:
    model = _few_blocks()
    reports = [
        bgd.quantize(model, vectors(), _config("full"), checkpoint=tmp_path / "run", progress=False).report
        for _ in range(2)
    ]
    assert _note(reports[0]) == _note(reports[1])
    assert "codewords are not used" in _note(reports[1])
