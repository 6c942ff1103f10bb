"""Numbers and tables as text."""

from __future__ import annotations

import pytest

from bgd_plugin.support.tables import mib, percent, table


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.00%"), (1.0, "100.00%"), (0.1234, "12.34%"), (0.001, "0.10%"), (0.00031, "0.031%"), (3.1e-7, "3.1e-05%")],
)
def test_small_shares_keep_two_digits(share: float, text: str) -> None:
    assert percent(share) == text


def test_sizes_are_in_the_unit_that_suits_them() -> None:
    assert (mib(2**20), mib(1536)) == ("1.000 MiB", "1.50 KiB")


def test_numbers_are_right_aligned_and_empty_columns_left_out() -> None:
    lines = table(["name", "error", "note"], [["a", percent(0.5), ""], ["bcdef", percent(0.00031), ""]]).splitlines()
    assert lines == ["name    error", "─────  ──────", "a      50.00%", "bcdef  0.031%"]
