"""A bound on the divergence: kept, corrected where the expectation was wrong, or said to be missed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.files.format import file_bytes, stored
from bgd_plugin.planning.answers import Answers
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.quantization import one_pass, quality
from bgd_plugin.quantization.quality import Pass, within_bound
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Report

Run = Callable[[int, Pass | None], Pass]


def _runs(*divergences: float | None) -> tuple[Run, list[Pass | None]]:
    """Passes with these measured divergences, each with other sizes and a smaller file, and the passes before them."""
    seen: list[Pass | None] = []

    def run(number: int, before: Pass | None) -> Pass:
        assert number == len(seen)
        seen.append(before)
        measured = divergences[number]
        answers = None
        if measured is not None:
            answers = Answers(samples=8, measure="KL divergence", divergence=measured, agreement=1.0, kept_aside=True)
        planned = PlannedLayer(
            **dict.fromkeys(("name", "target", "kind", "family"), "a"),
            weight_shape=(8, 8),
            block_size=4,
            codebook_size=2 + number,
            calls=("a",),
        )
        report = Report(
            layers=(LayerReport.of(planned, relative_error=0.1),),
            skipped=(),
            original_bytes=10**6,
            compressed_bytes=1000 if measured is None else int(1000 / max(1e-3, measured)),
            paper_bytes=1,
            answers=answers,
            expected_divergence=0.08,
            notes=(f"pass {number}",),
        )
        return Pass(report=report, survey=Mock(), network=nn.Identity, limit=0.1)

    return run, seen


@pytest.mark.parametrize("factor", [0.7, 0.99])
def test_a_good_expectation_takes_one_pass(factor: float) -> None:
    run, seen = _runs(0.1 * factor)
    result = within_bound(run)
    assert seen == [None]
    assert "kept" in result.report.notes[-1]


def test_the_passes_end_where_sizes_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_same_sizes", lambda one, other: True)
    run, seen = _runs(0.04, 0.04, 0.04)
    result = within_bound(run)
    assert len(seen) == 2
    assert "kept" in result.report.notes[-1]


def test_while_the_bound_is_missed_the_same_sizes_may_come_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass is more cautious; if that changes nothing, there is nothing to change."""
    monkeypatch.setattr(quality, "_same_sizes", lambda one, other: True)
    run, seen = _runs(5.0, 5.0, 5.0, 5.0)
    result = within_bound(run)
    assert len(seen) == 3
    assert "missed" in result.report.notes[-1]


@pytest.mark.parametrize("field", ["name", "block_size", "codebook_size", "compressed_bytes"])
def test_sizes_are_the_same_if_all_of_them_are(field: str) -> None:
    run, _ = _runs(0.3)
    report = run(0, None).report
    (layer,) = report.layers
    other = dataclasses.replace(layer, **{field: "b" if field == "name" else 7})
    assert quality._same_sizes(report, dataclasses.replace(report, notes=(), compressed_bytes=5))
    assert not quality._same_sizes(report, dataclasses.replace(report, layers=(other,)))
    assert not quality._same_sizes(report, dataclasses.replace(report, layers=(layer, layer)))


def test_any_pass_before_may_have_had_the_same_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = _runs(0.3, 0.3, 0.3, 0.09)
    compared: list[tuple[str, str]] = []

    def same(one: Report, other: Report) -> bool:
        compared.append((one.notes[0], other.notes[0]))
        return False

    monkeypatch.setattr(quality, "_same_sizes", same)
    within_bound(run)
    assert len(seen) == 4
    assert compared[:3] == [("pass 1", "pass 0"), ("pass 2", "pass 0"), ("pass 2", "pass 1")]
    assert compared[3:] == [("pass 3", f"pass {number}") for number in range(3)]


def test_of_equal_files_the_one_with_the_corrected_expectation_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_same_sizes", lambda one, other: True)
    run, _ = _runs(0.02, 0.02)
    assert within_bound(run).report.notes[0] == "pass 1"


@pytest.mark.parametrize(("kept", "missed", "passes"), [(1300, 1000, 4), (1200, 1000, 3)])
def test_a_fourth_pass_is_for_a_wide_gap(kept: int, missed: int, passes: int) -> None:
    run, seen = _runs(0.05, 0.2, 0.2, 0.2)

    def sized(number: int, before: Pass | None) -> Pass:
        result = run(number, before)
        size = missed if number else kept
        return dataclasses.replace(result, report=dataclasses.replace(result.report, compressed_bytes=size))

    assert within_bound(sized).report.notes[0] == "pass 0"
    assert len(seen) == passes


def test_each_pass_knows_the_one_before_it() -> None:
    run, seen = _runs(0.3, 0.12, 0.09)
    result = within_bound(run)
    assert [one and one.report.notes for one in seen] == [None, ("pass 0",), ("pass 1",)]
    assert result.report.notes[0] == "pass 2" and "kept" in result.report.notes[-1]
    assert "after 3 passes" in result.report.notes[-1]


@pytest.mark.parametrize(
    ("divergences", "passes", "best"),
    [
        ((0.05, 0.09), 2, 1),  # half of the bound is a waste: the second file is smaller
        ((0.07,), 1, 0),  # not so much of one
        ((0.2, 0.06), 2, 1),  # after a second pass, only less than half is
        ((0.2, 0.04, 0.08), 3, 2),
        ((0.05, 0.2, 0.3, 0.08), 4, 3),  # a file four times as small would be too small: one between them is looked for
        ((0.3, 0.2, 0.25, 0.01), 4, 3),  # a bound that was not kept gets further passes, until one keeps it
        ((0.3, 0.2, 0.25, 0.22, 0.15, 0.16), 6, 4),  # the nearest one
        ((None,), 1, 0),
        ((0.0,), 1, 0),
    ],
)
def test_the_best_of_some_passes(divergences: tuple[float | None, ...], passes: int, best: int) -> None:
    run, seen = _runs(*divergences)
    result = within_bound(run)
    assert len(seen) == passes
    assert result.report.notes[0] == f"pass {best}"
    is_kept = (divergences[best] or 0.0) <= 0.1
    assert result.report.notes[-1].startswith("bound: kept" if is_kept else "bound: missed")
    assert ("passes" in result.report.notes[-1]) == (passes > 1)


def test_an_iterator_is_walked_once_for_all_passes_and_each_has_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always a second pass, whatever it is worth."""
    monkeypatch.setattr(one_pass, "_SMALLER", 2.0)
    monkeypatch.setattr(quality, "_is_good_enough", lambda report, limit, slack: slack != quality._SLACK[0])
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


def test_the_passes_end_where_another_one_is_not_worth_its_time() -> None:
    run, seen = _runs(0.02, 0.04)
    result = within_bound(lambda number, before: run(number, before) if number < 2 else None)
    assert len(seen) == 2 and result.report.notes[0] == "pass 1"
    assert "kept" in result.report.notes[-1] and "after 2 passes" in result.report.notes[-1]


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
