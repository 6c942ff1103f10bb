"""What the report says: numbers, reasons, and a table."""

from __future__ import annotations

import json
import re

import pytest

import bgd_plugin as bgd
from bgd_plugin import FinetuningConfig
from bgd_plugin.results import Report
from tests.networks import SmallResNet, em, images, randomized


@pytest.fixture(scope="module")
def report() -> Report:
    return bgd.quantize(
        randomized(SmallResNet()), images(), em(finetuning=FinetuningConfig(steps=1)), progress=False
    ).report


def test_it_has_a_row_for_every_layer_of_the_plan(report: Report) -> None:
    planned = bgd.plan(SmallResNet(), em())
    fields = ("name", "kind", "block_size", "codebook_size", "weights", "bits_per_weight", "compressed_bytes", "note")
    assert len(report.layers) == len(planned.layers) == 4
    for found, wanted in zip(report.layers, planned.layers, strict=True):
        assert [getattr(found, f) for f in fields] == [getattr(wanted, f) for f in fields]
    assert report.skipped == planned.skipped


def test_every_layer_loses_something_but_not_everything(report: Report) -> None:
    assert all(0 < layer.relative_error < 1 for layer in report.layers)


def test_the_ratio_is_that_of_the_bytes(report: Report) -> None:
    assert report.original_bytes == bgd.plan(SmallResNet(), em()).original_bytes
    assert report.ratio == report.original_bytes / report.compressed_bytes


def test_the_table_names_layers_reasons_and_totals(report: Report) -> None:
    text = str(report)
    for layer in report.layers:
        assert re.search(rf"^{layer.name} .*{layer.relative_error:.2%}", text, flags=re.MULTILINE)
    assert re.search(r"^stem +first_layer=None$", text, flags=re.MULTILINE)
    assert f"4 layers quantized, 1 left float: {report.original_bytes / 1024:.2f} KiB" in text
    assert f"({report.ratio:.1f}×)" in text
    assert "finetuning: loss" in text


def test_json_has_everything(report: Report) -> None:
    values = json.loads(report.to_json())
    assert values["compressed_bytes"] == report.compressed_bytes
    assert values["ratio"] == report.ratio
    assert values["layers"][0]["relative_error"] == report.layers[0].relative_error
    assert values["skipped"] == [{"name": "stem", "reason": "first_layer=None"}]
    assert values["notes"] == list(report.notes)


def test_the_seconds_of_each_step_are_there(report: Report) -> None:
    assert {"fit", "finetune"} <= set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())
