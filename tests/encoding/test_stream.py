"""Entropy-coded streams: there and back, read by a literal decoder, near the entropy, and safe against damage."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bgd_plugin.encoding import stream as streams
from bgd_plugin.encoding.stream import LANE, Packed, coded_bytes, decoded, encoded, is_codable
from bgd_plugin.encoding.tables import NEXT_STATE
from tests.encoding.walks import random_walk


def _codes(rows: int, columns: int, size: int, seed: int = 0) -> Tensor:
    """Codes of which the middle ones are the most frequent."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * size / 8 + size / 2).long().clamp(0, size - 1)


def _read(content: bytes, count: int, size: int) -> list[int]:
    """A stream, read code by code, in integers of any length."""
    form, columns, at = content[0], int.from_bytes(content[1:5], "little"), 5
    bits = int.from_bytes(content[at : at + math.ceil(1.5 * size)], "little")
    frequency = [bits >> 12 * i & 4095 for i in range(size)]
    at += math.ceil(1.5 * size)
    rows = count // columns
    step = max(1, LANE // columns)
    lanes = [min(step, rows - start) for start in range(0, rows, step)]
    counts = [int.from_bytes(content[at + 2 * i : at + 2 * i + 2], "little") for i in range(len(lanes))]
    at += 2 * len(lanes)
    states = [int.from_bytes(content[at + 4 * i : at + 4 * i + 4], "little") for i in range(len(lanes))]
    at += 4 * len(lanes)
    codes = []
    for own_rows, own_count, x in zip(lanes, counts, states, strict=True):
        words = [int.from_bytes(content[at + 2 * i : at + 2 * i + 2], "little") for i in range(own_count)]
        at += 2 * own_count
        for _ in range(own_rows):
            trellis = 0
            for _ in range(columns):
                allowed = [c for c in range(size) if form == 4 or (c + form) % 2 == trellis % 2]
                start = 0
                for code in allowed:
                    if start + frequency[code] > x % 4096:
                        break
                    start += frequency[code]
                x = frequency[code] * (x // 4096) + x % 4096 - start
                while x < 2**16:
                    x = x * 2**16 + words.pop(0)
                codes.append(code)
                if form != 4:
                    trellis = int(NEXT_STATE[trellis][(code + form) // 2 % 2])
        assert (x, words) == (2**16, [])
    assert at == len(content)
    return codes


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), size=st.integers(2, 256), seed=st.integers(0, 99))
def test_codes_come_back(rows: int, columns: int, size: int, seed: int) -> None:
    codes = _codes(rows, columns, size, seed)
    (content,) = encoded([(codes, size)])
    (back,) = decoded([Packed(content=content, count=codes.numel(), size=size)])
    assert torch.equal(back.long(), codes)


@pytest.mark.parametrize("offset", [None, 0, 1, 2, 3])
def test_a_literal_decoder_reads_the_stream(offset: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LANE", 100)
    monkeypatch.setitem(globals(), "LANE", 100)
    size, rows, columns = 21, 23, 30
    codes = _codes(rows, columns, size)
    if offset is not None:
        codes = torch.from_numpy(random_walk(rows=rows, columns=columns, size=size, offset=offset))
    (content,) = encoded([(codes, size)])
    assert content[0] == (4 if offset is None else offset)
    assert _read(bytes(content.tolist()), codes.numel(), size) == codes.flatten().tolist()
    (back,) = decoded([Packed(content=content, count=codes.numel(), size=size)])
    assert torch.equal(back.long(), codes)


def test_layers_of_all_shapes_are_coded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LANE", 64)
    walk = torch.from_numpy(random_walk(rows=11, columns=20, size=9, offset=2))
    layers = [(_codes(*shape, size), size) for *shape, size in ((40, 7, 5), (3, 70, 256), (1, 1, 2))]  # type: ignore[misc]
    layers.insert(1, (walk, 9))
    together = encoded(layers)
    assert [bytes(x.tolist()) for x in together] == [bytes(encoded([layer])[0].tolist()) for layer in layers]
    packed = [Packed(content=x, count=c.numel(), size=k) for x, (c, k) in zip(together, layers, strict=True)]
    for back, (codes, _) in zip(decoded(packed), layers, strict=True):
        assert torch.equal(back.long(), codes)


def test_a_stream_is_near_the_entropy() -> None:
    codes = _codes(200, 300, 64)
    counts = Counter(codes.flatten().tolist())
    entropy = -sum(n * math.log2(n / codes.numel()) for n in counts.values()) / 8
    (content,) = encoded([(codes, 64)])
    overhead = 5 + 96 + 6 * 4  # form and columns, table, lanes
    assert entropy + overhead - 8 <= len(content) <= 1.003 * entropy + overhead


def test_the_trellis_saves_the_bit_that_it_implies() -> None:
    codes = torch.from_numpy(random_walk(rows=60, columns=80, size=12, offset=1))
    counts = Counter(codes.flatten().tolist())
    entropy = -sum(n * math.log2(n / codes.numel()) for n in counts.values()) / 8
    assert len(encoded([(codes, 12)])[0]) < entropy - 0.8 * codes.numel() / 8


@pytest.mark.parametrize("offset", [None, 3])
def test_the_length_is_known_without_coding(offset: int | None) -> None:
    codes = (
        _codes(90, 100, 30)
        if offset is None
        else torch.from_numpy(random_walk(rows=90, columns=100, size=30, offset=offset))
    )
    length = len(encoded([(codes, 30)])[0])
    assert length <= coded_bytes(codes, 30) <= 1.002 * length + 8


def test_what_can_be_coded() -> None:
    assert is_codable(256, 10)
    assert not is_codable(257, 10)
    assert not is_codable(1, 10)
    assert not is_codable(16, 4 * LANE + 1)


def _packed() -> Packed:
    codes = torch.from_numpy(random_walk(rows=8, columns=20, size=10, offset=2))
    return Packed(content=encoded([(codes, 10)])[0], count=160, size=10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 300}, "begin"),
        ({"size": 11}, "sum to 4096"),
        ({"count": 161}, "begin"),
        ({"count": 140}, "do not end"),
        ({"count": 20 * 16384}, "lanes"),
        ({"count": 0}, "lanes"),
    ],
)
def test_a_stream_of_other_codes_is_refused(fields: dict[str, Any], message: str) -> None:
    packed = _packed()
    with pytest.raises(ValueError, match=message):
        decoded([Packed(**({"content": packed.content, "count": packed.count, "size": packed.size} | fields))])


def test_damaged_streams_are_refused_or_give_codes_in_range() -> None:
    packed, rng = _packed(), random.Random(0)
    refused = 0
    for _ in range(300):
        content = bytearray(packed.content.tolist())
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.choice((0, 255, rng.randrange(256)))
        content = content[: rng.choice((len(content), rng.randrange(len(content) + 1)))]
        try:
            tensor = torch.tensor(list(content), dtype=torch.uint8)
            (back,) = decoded([Packed(content=tensor, count=packed.count, size=packed.size)])
        except ValueError:
            refused += 1
        else:
            assert back.numel() == 160
            assert int(back.max()) < 10
    assert refused > 250


def test_a_stream_of_other_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        decoded([Packed(content=_packed().content.int(), count=160, size=10)])


def test_no_lane_has_more_words_than_its_count_can_say() -> None:
    assert 4 * LANE * 12 / 16 < 2**16


def test_a_row_of_the_rarest_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LANE", 256)
    codes = (torch.arange(1024) % 255)[None]
    codes[:, ::2] = 255  # half of the codes are one and the same
    (content,) = encoded([(codes, 256)])
    (back,) = decoded([Packed(content=content, count=1024, size=256)])
    assert torch.equal(back.long(), codes)
