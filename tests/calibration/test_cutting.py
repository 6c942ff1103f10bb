"""Samples of a batch: which can be cut, into what, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch

from bgd_plugin.calibration import Batch, cutting
from bgd_plugin.calibration.cutting import can_be_cut, first_samples, pieces_of, some_samples_of

X = torch.arange(35.0).reshape(7, 5)


@pytest.mark.parametrize(("step", "sizes"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (6, [6, 1]), (7, [7])])
def test_pieces_are_as_large_as_fits_and_in_order(step: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch((X,), {"mask": X > 3, "n": 2})
    sample_bytes = (X.nbytes + 35) // 7
    monkeypatch.setattr(cutting, "_PIECE_BYTES", step * sample_bytes)
    pieces = list(pieces_of(batch, lambda _: True))
    assert [piece.size for piece in pieces] == sizes
    assert torch.equal(torch.cat([piece.args[0] for piece in pieces]), X)
    assert torch.equal(torch.cat([piece.kwargs["mask"] for piece in pieces]), X > 3)
    assert all(piece.kwargs["n"] == 2 for piece in pieces)
    assert list(pieces_of(batch, lambda _: False)) == [batch]


def test_only_batches_of_samples_can_be_cut() -> None:
    assert can_be_cut(Batch((X,), {"y": X[:, 0]}))
    for other in (Batch((X, X[:3])), Batch((X, torch.tensor(1.0))), Batch((1,))):
        assert not can_be_cut(other)


def test_samples_are_copies_and_all_of_them_are_the_batch_itself() -> None:
    batch = Batch((X.clone(),))
    assert some_samples_of(batch, range(7)) is batch
    found = some_samples_of(batch, [4, 1])
    found.args[0].zero_()
    assert torch.equal(batch.args[0], X)
    assert torch.equal(some_samples_of(batch, [4, 1]).args[0], X[[4, 1]])


def test_the_first_samples_end_within_a_batch() -> None:
    batches = [Batch((X,)), Batch((X + 100,)), Batch((X + 200,))]
    assert [batch.size for batch in first_samples(batches, 9)] == [7, 2]
    assert [batch.size for batch in first_samples(batches, 7)] == [7]
    assert [batch.size for batch in first_samples(batches, 99)] == [7, 7, 7]
    assert first_samples(batches, 0) == []
    whole = [Batch((X, 3, torch.tensor(1.0)))]
    assert first_samples(whole, 2) == whole
