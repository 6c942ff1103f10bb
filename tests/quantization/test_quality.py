"""A bound on the divergence: kept, corrected where the expectation was wrong, or said to be missed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.files.format import file_bytes, stored
from bgd_plugin.planning.answers import Answers
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.quantization import quality
from bgd_plugin.quantization.quality import Pass, within_bound
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Report


def _runs(divergence: Callable[[float], float]) -> tuple[Callable[[float, int], Pass], list[float]]:
    """Runs whose file has as many bytes as the expected loss allows, and whose true divergence is a function of it."""
    seen: list[float] = []

    def run(realized: float, number: int) -> Pass:
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
        return Pass(report=report, network=nn.Identity, limit=0.1)

    return run, seen


@pytest.mark.parametrize("factor", [0.7, 0.99])
def test_a_good_expectation_takes_one_pass(factor: float) -> None:
    run, seen = _runs(lambda loss: factor * loss)
    result = within_bound(run)
    assert seen == [1.0]
    assert "kept" in result.report.notes[-1]


def test_the_passes_end_where_sizes_do_not_change() -> None:
    run, seen = _runs(lambda loss: 5.0)
    result = within_bound(run)
    assert len(seen) == 2  # reports without layers have the same sizes
    assert "missed" in result.report.notes[-1]


def _passes(*divergences: float | None) -> tuple[Callable[[float, int], Pass], list[float]]:
    """Runs with these measured divergences, each with other sizes, in files of 1000 bytes over the expected loss."""
    run, seen = _runs(lambda loss: loss)

    def one(realized: float, number: int) -> Pass:
        result = run(realized, number)
        report, measured = result.report, divergences[number]
        assert report.answers is not None
        answers = None if measured is None else dataclasses.replace(report.answers, divergence=measured)
        planned = PlannedLayer(
            **dict.fromkeys(("name", "target", "kind", "family"), "a"),
            weight_shape=(8, 8),
            block_size=4,
            codebook_size=2 + number,
            calls=("a",),
        )
        layers, notes = (LayerReport.of(planned, relative_error=0.1),), (f"pass {number}",)
        return dataclasses.replace(
            result, report=dataclasses.replace(report, answers=answers, layers=layers, notes=notes)
        )

    return one, seen


def test_each_pass_corrects_what_the_one_before_it_expected() -> None:
    """By measured over expected; corrections multiply."""
    run, seen = _passes(0.3, 0.12, 0.09)
    result = within_bound(run)
    assert seen == pytest.approx([1.0, 3.0, 3.0 * (0.12 / 0.1)])
    assert result.report.notes[0] == "pass 2" and "kept" in result.report.notes[-1]
    assert "after 3 passes" in result.report.notes[-1]


@pytest.mark.parametrize(
    ("divergences", "passes", "best"),
    [
        ((0.05, 0.09), 2, 1),  # half of the bound is a waste: the second file is smaller
        ((0.05, 0.2, 0.3), 3, 0),  # but what is beyond the bound does not count
        ((0.07,), 1, 0),  # not so much of one
        ((0.2, 0.01), 2, 1),  # and no pass is worth it a second time
        ((0.3, 0.2, 0.25), 3, 1),  # the nearest one
        ((None,), 1, 0),
        ((0.0,), 1, 0),
    ],
)
def test_the_best_of_three_passes_at_most(divergences: tuple[float | None, ...], passes: int, best: int) -> None:
    run, seen = _passes(*divergences)
    result = within_bound(run)
    assert len(seen) == passes
    assert result.report.notes[0] == f"pass {best}"
    is_kept = (divergences[best] or 0.0) <= 0.1
    assert result.report.notes[-1].startswith("bound: kept" if is_kept else "bound: missed")
    assert ("passes" in result.report.notes[-1]) == (passes > 1)


def test_an_iterator_is_walked_once_for_all_passes_and_each_has_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always a second pass, with half of the divergence."""
    monkeypatch.setattr(quality, "_correction", lambda report, bound, is_first: 2.0 if is_first else None)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    data = [3 * torch.randn(16, 12) for _ in range(4)]
    config = bgd.BGDConfig(max_divergence=1e-2, rounds=1)
    files = []
    for calibration, folder in ((data, None), (iter(data), tmp_path / "run")):
        result = bgd.quantize(model, calibration, config, checkpoint=folder, progress=False)
        files.append(file_bytes(stored(result.model)))
    assert files[0] == files[1]
    assert "after 2 passes" in result.report.notes[-1]
    assert (tmp_path / "run" / "run.json").is_file() and (tmp_path / "run" / "pass-2" / "run.json").is_file()


def _network() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    ).eval()
    model[-1].weight.data *= 10  # an answer tells something of the sample
    return model


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
