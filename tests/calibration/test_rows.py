"""Rows drawn from a layer's inputs: the same positions in both networks, others for each piece and each seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin.calibration import CollectedInputs, PairedRows, paired_pieces, sampled_inputs
from bgd_plugin.calibration import rows as row_module
from bgd_plugin.pq.blocks import Geometry, unfold_inputs
from bgd_plugin.pq.maps import Maps

LINEAR = Geometry.linear()


def _numbered(pieces: int, rows: int = 50) -> list[Tensor]:
    """The same rows in each piece, told by their number."""
    return [torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 3) for _ in range(pieces)]


def _inputs(student: list[Tensor], reference: list[Tensor]) -> CollectedInputs:
    mine, theirs = ([[(x, LINEAR)] for x in values] for values in (student, reference))
    return CollectedInputs("layer", mine, theirs)


def _drawn(seed: int, pieces: int = 3, rows: int = 30) -> list[list[float]]:
    values = _numbered(pieces)
    generator = torch.Generator().manual_seed(seed)
    found = list(paired_pieces(_inputs(values, [x + 1000 for x in values]), rows, generator))
    for index, piece in enumerate(found):
        assert (piece.index, piece.pieces) == (index, pieces)
        torch.testing.assert_close(piece.reference, piece.student + 1000)
    return [piece.student[0, :, 0].tolist() for piece in found]


def test_each_piece_draws_its_share_at_positions_of_its_own() -> None:
    first, second, third = drawn = _drawn(0)
    assert [len(rows) for rows in drawn] == [10, 10, 10]
    assert first != second != third != first
    assert all(len(set(rows)) == 10 for rows in drawn)


def test_every_piece_depends_on_the_generator() -> None:
    one, same, other = _drawn(0), _drawn(0), _drawn(1)
    assert one == same
    assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))


def test_the_last_pieces_share_is_rounded_up_and_at_least_one_row() -> None:
    assert [len(rows) for rows in _drawn(0, pieces=3, rows=31)] == [11, 11, 11]
    assert [len(rows) for rows in _drawn(0, pieces=3, rows=1)] == [1, 1, 1]
    assert [len(rows) for rows in _drawn(0, pieces=3, rows=10**6)] == [50, 50, 50]


def test_a_drift_is_drawn_at_the_same_positions() -> None:
    values = _numbered(2)
    inputs, generator = _inputs(values, values), torch.Generator().manual_seed(0)
    drift = [torch.arange(50.0)[:, None] * torch.tensor([1.0, -1.0]) + 100 * n for n in range(2)]
    pieces = paired_pieces(inputs, 20, generator, lambda batch: drift[batch], lambda batch: 3 * drift[batch])
    for number, piece in enumerate(pieces):
        assert piece.drift is not None and piece.stream is not None
        rows = piece.student[0, :, :1]
        torch.testing.assert_close(piece.drift, rows * torch.tensor([1.0, -1.0]) + 100 * number)
        torch.testing.assert_close(piece.stream, 3 * piece.drift)


def test_a_sample_is_spread_over_all_pieces() -> None:
    values = [x + 1000 * n for n, x in enumerate(_numbered(3))]
    rows = sampled_inputs(_inputs(values, values), 31, torch.Generator().manual_seed(0)).rows[0, :, 0]
    assert [int(((rows // 1000) == n).sum()) for n in range(3)] == [11, 11, 11]
    other = sampled_inputs(_inputs(values, values), 31, torch.Generator().manual_seed(1)).rows[0, :, 0]
    assert not torch.equal(rows, other)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_draw_what_one_with_all_the_data_draws(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have every other piece."""
    values = [x + 1000 * n for n, x in enumerate(_numbered(4))]
    whole = list(paired_pieces(_inputs(values, values), 40, torch.Generator().manual_seed(0)))
    monkeypatch.setattr(row_module, "processes", lambda: 2)
    monkeypatch.setattr(row_module, "rank", lambda: rank)
    monkeypatch.setattr(row_module, "total", lambda number: 2 * number)
    half = list(paired_pieces(_inputs(values[rank::2], values[rank::2]), 40, torch.Generator().manual_seed(0)))
    for mine, theirs in zip(half, whole[rank::2], strict=True):
        assert (mine.index, mine.pieces) == (theirs.index, theirs.pieces)
        assert torch.equal(mine.student, theirs.student)


def _convolved(count: int, share: int, **given: object) -> tuple[list[PairedRows], list[Tensor], list[Tensor]]:
    """Pieces of a convolution's inputs, two samples of 36 positions each, and all its rows and outputs."""
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry.of((3, 3), 1, 1, 1, 1)
    values = [torch.randn(2, 5, 6, 6, generator=generator) for _ in range(count)]
    outputs = [torch.randn(2, 4, 6, 6, generator=generator) for _ in range(count)]
    inputs = CollectedInputs("layer", *([[(x, geometry)] for x in values] for _ in range(2)))
    pieces = list(
        paired_pieces(inputs, count * share, torch.Generator().manual_seed(1), outputs=outputs.__getitem__, **given)  # type: ignore[arg-type]
    )
    rows = [unfold_inputs(x, geometry) for x in values]
    return pieces, rows, [y.movedim(1, -1).reshape(1, -1, 4) for y in outputs]


@pytest.mark.parametrize("share", [36, 50, 72, 100])
def test_pieces_of_up_to_twice_their_share_are_maps_of_all_positions(share: int) -> None:
    pieces, rows, outputs = _convolved(3, share)
    for piece, mine, theirs in zip(pieces, rows, outputs, strict=True):
        assert isinstance(piece.inputs, Maps)
        assert torch.equal(piece.student, mine)
        assert torch.equal(piece.reference, theirs)


def test_what_else_is_drawn_is_taken_whole_with_the_maps() -> None:
    drift = [torch.randn(2, 4, 6, 6) for _ in range(3)]
    pieces, _, _ = _convolved(3, 40, drift=drift.__getitem__)
    for piece, lost in zip(pieces, drift, strict=True):
        assert piece.drift is not None
        assert torch.equal(piece.drift, lost.movedim(1, -1).reshape(-1, 4))


@pytest.mark.parametrize("case", ["many positions", "weights"])
def test_else_rows_are_drawn(case: str) -> None:
    given = {"stream": lambda _: torch.ones(2, 4, 6, 6)} if case == "weights" else {}
    pieces, rows, outputs = _convolved(3, 40 if case == "weights" else 35, **given)
    for piece, mine, theirs in zip(pieces, rows, outputs, strict=True):
        assert isinstance(piece.inputs, Tensor)
        assert piece.student.shape[1] in (35, 40)
        places = [int((mine[0] == row).all(1).nonzero()) for row in piece.student[0]]
        assert torch.equal(piece.reference[0], theirs[0][places])


def test_maps_that_are_not_finite_name_the_layer() -> None:
    geometry = Geometry.of((3, 3), 1, 1, 1, 1)
    calls = [[(torch.full((2, 5, 6, 6), torch.nan), geometry)]]
    inputs = CollectedInputs("the.layer", calls, calls)
    with pytest.raises(bgd.errors.CalibrationError, match=r"the\.layer"):
        list(paired_pieces(inputs, 72, torch.Generator(), outputs=lambda _: torch.ones(2, 4, 6, 6)))
