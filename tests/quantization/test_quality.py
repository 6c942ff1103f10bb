"""A bound on the divergence: kept, corrected where the expectation was wrong, or said to be missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.planning.answers import Answers
from bgd_plugin.quantization.quality import within_bound
from bgd_plugin.report.report import Quantized, Report


def _runs(divergence: Callable[[float], float]) -> tuple[Callable[[float, int], Quantized], list[float]]:
    """Runs whose file has as many bytes as the expected loss allows, and whose true divergence is a function of it."""
    seen: list[float] = []

    def run(realized: float, number: int) -> Quantized:
        assert number == len(seen)
        seen.append(realized)
        loss = 0.1 / realized  # what the chooser spends on a bound of 0.1
        answers = Answers(
            samples=8, measure="KL divergence", divergence=divergence(loss), agreement=1.0, kept_aside=True
        )
        report = Report(
            layers=(),
            skipped=(),
            original_bytes=10**6,
            compressed_bytes=int(1000 / loss),
            paper_bytes=1,
            answers=answers,
            expected_divergence=loss * realized,
        )
        return Quantized(nn.Identity(), report)

    return run, seen


@pytest.mark.parametrize("factor", [0.7, 0.99])
def test_a_good_expectation_takes_one_pass(factor: float) -> None:
    run, seen = _runs(lambda loss: factor * loss)
    result = within_bound(run, 0.1)
    assert seen == [1.0]
    assert "kept" in result.report.notes[-1]


def test_the_passes_end_where_sizes_do_not_change() -> None:
    run, seen = _runs(lambda loss: 5.0)
    result = within_bound(run, 0.1)
    assert len(seen) == 2  # reports without layers have the same sizes
    assert "missed" in result.report.notes[-1]


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    ).eval()


def test_a_real_network_stays_within_its_bound() -> None:
    torch.manual_seed(1)
    model, data = _network(), [3 * torch.randn(32, 12) for _ in range(4)]
    sizes = []
    for bound in (0.0005, 0.005):
        report = bgd.quantize(model, data, bgd.BGDConfig(max_divergence=bound), progress=False).report
        assert report.answers is not None
        assert report.answers.kept_aside
        assert report.answers.divergence <= bound
        assert "bound: kept" in report.notes[-1]
        sizes.append(report.compressed_bytes)
    assert sizes[1] < sizes[0]
