"""Masks in a file: every form gives back what it was given, in the bytes that it says, and refuses what is damaged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bgd_plugin.encoding.masks import mask_form, pack_mask, unpack_mask


def n_of_m(shape: tuple[int, ...], kept: int, size: int, *, channels: bool = False, seed: int = 0) -> Tensor:
    """A random mask that keeps `kept` of each `size` weights along the rows, or along the channels."""
    ordered = (shape[0], *shape[2:], shape[1]) if channels else (shape[0], math.prod(shape[1:]))
    scores = torch.rand(math.prod(shape) // size, size, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(kept, 1).indices, True).reshape(ordered)
    return (mask.movedim(-1, 1) if channels else mask).reshape(shape).contiguous()


@pytest.mark.parametrize(
    ("kept", "size", "bits"),
    [(1, 2, 1), (1, 4, 2), (2, 4, 3), (3, 4, 2), (4, 8, 7), (2, 8, 5), (1, 16, 4), (8, 16, 14)],
)
@pytest.mark.parametrize("channels", [False, True])
def test_n_of_m_takes_the_bits_of_its_patterns(kept: int, size: int, bits: int, channels: bool) -> None:
    mask = n_of_m((8, 32, 3, 3), kept, size, channels=channels)
    form = mask_form(mask)
    packed = pack_mask(mask, form)
    assert form == f"{kept}:{size}{' channels' if channels else ''}"
    assert packed.numel() == -(-mask.numel() // size * bits // 8)
    assert torch.equal(unpack_mask(packed, form, mask.shape), mask)


def test_whole_rows_and_columns_take_a_bit_each() -> None:
    mask = torch.ones(16, 8, 3, 3, dtype=torch.bool)
    mask[3] = False
    mask[:, 5] = False
    packed = pack_mask(mask, mask_form(mask))
    assert mask_form(mask) == "lines"
    assert packed.numel() == (16 + 8 * 9) // 8
    assert torch.equal(unpack_mask(packed, "lines", mask.shape), mask)


def test_an_unstructured_mask_takes_a_bit_for_each_weight() -> None:
    mask = torch.rand(16, 30) < 0.6
    packed = pack_mask(mask, mask_form(mask))
    assert mask_form(mask) == "bits"
    assert packed.numel() == 16 * 30 // 8
    assert torch.equal(unpack_mask(packed, "bits", mask.shape), mask)


def test_a_single_zero_does_not_cost_a_bit_for_each_weight() -> None:
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[7, 9] = False
    mask[50, 1] = False
    packed = pack_mask(mask, mask_form(mask))
    assert mask_form(mask) == "positions"
    assert packed.numel() == 8
    assert torch.equal(unpack_mask(packed, "positions", mask.shape), mask)


@given(st.integers(1, 6), st.integers(1, 24), st.sampled_from([(), (1,), (3, 3)]), st.floats(0, 1), st.integers(0, 99))
def test_any_mask_comes_back(rows: int, columns: int, kernel: tuple[int, ...], share: float, seed: int) -> None:
    mask = torch.rand(rows, columns, *kernel, generator=torch.Generator().manual_seed(seed)) < share
    form = mask_form(mask)
    packed = pack_mask(mask, form)
    assert torch.equal(unpack_mask(packed, form, mask.shape), mask)
    assert packed.numel() <= -(-mask.numel() // 8)


def test_a_form_that_does_not_hold_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="does not keep 2 of each 4"):
        pack_mask(n_of_m((4, 8), 1, 4), "2:4")


@pytest.mark.parametrize("form", ["", "3:2", "2:5", "0:4", "4:4", "2:4 rows", "zip"])
def test_a_form_that_does_not_exist_is_refused(form: str) -> None:
    with pytest.raises(ValueError, match="not a mask form"):
        unpack_mask(torch.zeros(3, dtype=torch.uint8), form, (2, 4))


@pytest.mark.parametrize(
    ("form", "packed", "message"),
    [
        ("2:4", [255], "pattern 7 is out of range: 2:4 has 6"),
        ("2:4", [0, 0], "2 codes of 3 bits need uint8"),
        ("2:16", [0], "does not divide into groups of 16"),
        ("bits", [1, 2], "8 codes of 1 bits need uint8"),
        ("positions", [1, 0, 0], "do not divide into positions of 4 bytes"),
        ("positions", [8, 0, 0, 0], "ascending integers below 8"),
        ("positions", [3, 0, 0, 0, 3, 0, 0, 0], "ascending integers below 8"),
        ("positions", [0, 0, 0, 255], "ascending integers below 8"),
    ],
)
def test_damaged_bytes_are_refused(form: str, packed: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_mask(torch.tensor(packed, dtype=torch.uint8), form, (2, 4))


def test_bytes_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype uint8 and one dimension"):
        unpack_mask(torch.zeros(2, 2, dtype=torch.uint8), "bits", (2, 4))
