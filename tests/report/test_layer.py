"""A layer's row: what a user is told to do about a bad one."""

from __future__ import annotations

import pytest

from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.report.layer import LayerReport


def _row(relative_error: float, rows: int = 64, codebook_size: int = 16) -> LayerReport:
    planned = PlannedLayer(
        name="head.fc",
        target="head.fc",
        kind="linear",
        family="linear",
        weight_shape=(rows, 64),
        block_size=4,
        codebook_size=codebook_size,
        calls=(),
    )
    return LayerReport.of(planned, relative_error=relative_error)


@pytest.mark.parametrize(("relative_error", "is_flagged"), [(0.29, False), (0.31, True), (4.0, True)])
def test_a_large_error_is_flagged(relative_error: float, is_flagged: bool) -> None:
    advice = _row(relative_error).advice
    assert ("output error above 30%" in advice) == is_flagged
    assert ("('head.fc', None)" in advice) == is_flagged


def test_a_layer_that_saves_next_to_nothing_is_flagged() -> None:
    assert _row(0.01, rows=4, codebook_size=128).advice.startswith("saves only 0.00 KiB of 0.50 KiB")
    assert _row(0.01).advice == ""
