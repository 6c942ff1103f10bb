"""Bit packing: round trip, length, order of bits, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.encoding.codes import code_dtype, pack, unpack


@given(bits=st.integers(1, 16), count=st.integers(0, 300), seed=st.integers(0, 9))
def test_codes_come_back_and_take_exactly_their_bits(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((count * bits + 7) // 8,)
    unpacked = unpack(packed, bits, count)
    assert unpacked.dtype == torch.int64
    assert torch.equal(unpacked, codes)


@given(bits=st.integers(1, 16), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_bits_stand_in_little_endian_order(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    number = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes((count * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", [1, 3, 11, 16])
@pytest.mark.parametrize("count", [65535, 65536, 65537, 3 * 65536])
def test_more_codes_than_one_chunk_holds(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,))
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_type_and_shape_goes_in(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 64, (7, 5))
    assert torch.equal(pack(codes.to(dtype), 6), pack(codes.flatten(), 6))


@pytest.mark.parametrize(("code", "bits"), [(256, 8), (-1, 8), (2, 1), (65536, 16)])
def test_a_code_that_does_not_fit_is_refused(code: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"{code}.* do not fit {bits} bits"):
        pack(torch.tensor([0, code]), bits)


@pytest.mark.parametrize("bits", [0, 17])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}: codes have 1 to 16 bits"):
        pack(torch.tensor([0]), bits)
    with pytest.raises(ValueError, match=f"bits={bits}: codes have 1 to 16 bits"):
        unpack(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_a_wrong_length_is_refused() -> None:
    packed = pack(torch.arange(8), 3)
    with pytest.raises(ValueError, match=r"9 codes of 3 bits need uint8 \(4,\), found torch.uint8 \(3,\)"):
        unpack(packed, 3, 9)
    with pytest.raises(ValueError, match=r"found torch\.int32"):
        unpack(packed.int(), 3, 8)


@pytest.mark.parametrize("codebook_size", [1, 2, 256, 257, 32768, 32769, 65536])
def test_the_code_type_is_the_smallest_that_holds_all_codes_and_can_be_broadcast(codebook_size: int) -> None:
    types = [torch.uint8, torch.int32]  # not 16 bits, which torch.distributed cannot send
    fitting = [dtype for dtype in types if torch.iinfo(dtype).max >= codebook_size - 1]
    assert code_dtype(codebook_size) == fitting[0]
