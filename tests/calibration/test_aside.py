"""Samples kept aside: which, how many, and that the rest is what the fit sees."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.calibration import Batch, Batches, first_samples, take_aside_


def _numbered(sizes: list[int]) -> list[Batch]:
    """Batches whose samples are their own numbers."""
    numbers = torch.arange(sum(sizes), dtype=torch.float32)
    return [Batch((part[:, None],), {"y": part}) for part in numbers.split(sizes)]


def _numbers(batches: list[Batch] | Batches) -> list[int]:
    return [int(x) for batch in batches for x in batch.args[0].flatten()]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.sampled_from([0.0, 0.05, 0.125, 0.5]))
def test_every_sample_goes_to_one_side(sizes: list[int], share: float) -> None:
    batches = Batches.of(_numbered(sizes))
    count = sum(sizes)
    aside = take_aside_(batches, share)
    taken, left = _numbers(aside), _numbers(batches)
    assert sorted([*taken, *left]) == list(range(count))
    assert len(taken) == (min(64, int(share * count)) if count >= 16 else 0)
    assert left
    for batch in [*aside, *batches]:  # the tensors of a batch are cut alike
        assert torch.equal(batch.args[0][:, 0], batch.kwargs["y"])


def test_they_are_spread_over_the_data() -> None:
    batches = Batches.of(_numbered([32] * 8))
    taken = _numbers(take_aside_(batches, 0.125))
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert set(gaps) == {8}
    assert taken[0] == 4


def test_a_batch_that_cannot_be_cut_stays_whole() -> None:
    batches = Batches.of([Batch((torch.full((4, 2), float(i)),), {"scale": torch.ones(7)}) for i in range(10)])
    aside = take_aside_(batches, 0.25)
    assert [float(b.args[0][0, 0]) for b in aside] == [3.0, 7.0]
    assert len(batches) == 8


@pytest.mark.parametrize("bound", [None, 1, 10_000])
def test_under_a_memory_bound_the_same_samples(bound: int | None) -> None:
    batches = Batches.of(_numbered([1, 20, 20, 1]), bound)
    aside = take_aside_(batches, 0.5)
    assert _numbers(aside) == list(range(1, 42, 2))
    assert _numbers(batches) == list(range(0, 42, 2))


def test_first_samples_cuts_the_last_batch() -> None:
    assert _numbers(first_samples(_numbered([5, 5, 5]), 7)) == list(range(7))
