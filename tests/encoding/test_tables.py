"""Frequencies of codes, and walks through the trellis."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.encoding.tables import NEXT_STATE, STATES, TOTAL, contexts, frequencies, trellis_offset
from tests.encoding.walks import random_walk


@given(counts=st.lists(st.integers(0, 5) | st.integers(0, 10**9), min_size=2, max_size=256))
def test_frequencies_sum_to_the_total_and_leave_no_code_out(counts: list[int]) -> None:
    found = frequencies(numpy.array(counts))
    assert found.sum() == TOTAL
    assert all(f >= 1 for f, count in zip(found, counts, strict=True) if count)
    assert found.max() < TOTAL
    assert found.min() >= 0


def test_frequencies_are_in_proportion() -> None:
    assert frequencies(numpy.array([1, 2, 1, 0])).tolist() == [1024, 2048, 1024, 0]
    assert frequencies(numpy.array([0, 0])).tolist() == [2048, 2048]
    assert frequencies(numpy.array([0, 7, 0])).tolist() == [0, 4095, 1]


def test_from_every_state_a_code_of_each_kind_leads_somewhere_else() -> None:
    assert all(len(set(row)) == 2 for row in NEXT_STATE.tolist())
    assert sorted(NEXT_STATE.ravel().tolist()) == sorted([*range(STATES)] * 2)


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("size", [4, 7, 40])
def test_a_walk_through_the_trellis_is_known_by_its_codes(size: int, offset: int) -> None:
    codes = random_walk(rows=30, columns=25, size=size, offset=offset)
    assert trellis_offset(codes, size) == offset
    codes[17, 24] ^= 1  # the other quantizer
    assert trellis_offset(codes, size) != offset


def test_other_codes_are_no_walk() -> None:
    codes = numpy.random.default_rng(0).integers(0, 16, (20, 20))
    assert trellis_offset(codes, 16) is None
    assert trellis_offset(codes[:0], 16) is None
    assert trellis_offset(numpy.zeros((1, 1), dtype=int), 3) is None


def test_a_code_belongs_to_the_quantizer_of_its_place() -> None:
    assert contexts(5, 1).tolist() == [1, 0, 1, 0, 1]
    assert contexts(3, None).tolist() == [0, 0, 0]
