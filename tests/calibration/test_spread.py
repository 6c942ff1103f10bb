"""Some batches in place of all."""

from __future__ import annotations

import pytest

from bgd_plugin.calibration import enough_batches


@pytest.mark.parametrize(
    ("count", "samples", "positions", "needed", "expected"),
    [
        (100, 1, 10_000, 1000, range(100)),  # 64 samples at the least: one batch in two would be 50
        (128, 1, 10_000, 1000, range(0, 128, 2)),
        (128, 4, 10_000, 1000, range(0, 128, 8)),
        (128, 8, 10_000, 1000, range(0, 128, 8)),  # 16 batches at the least
        (15, 1000, 10_000, 1000, range(15)),
        (1000, 1, 10, 2000, range(0, 1000, 5)),  # 200 samples
        (1000, 1, 10, 9999, range(1000)),
        (0, 1, 1, 1, range(0)),
    ],
)
def test_as_many_as_are_needed_all_over_them(
    count: int, samples: int, positions: int, needed: int, expected: range
) -> None:
    assert list(enough_batches(count, samples, positions, needed)) == list(expected)
