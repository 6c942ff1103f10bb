"""Codes as entropy-coded streams: as many bits as their frequencies are worth, instead of the same for each.

A stream is: one byte, the place of the first code in the trellis' grid (0 to 3) or 4 without a trellis; the codes in a
row, four bytes; the frequencies, 12 bits for each of the codes there are; for each lane the number of its words, two
bytes, and its state, four; all words, two bytes each. All numbers are little-endian. A lane holds as many whole rows as
make up `LANE` codes, or one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from bgd_plugin.encoding.codes import pack, unpack
from bgd_plugin.encoding.rans import LOW, Coder, Lane, decode_lanes, encode_lanes
from bgd_plugin.encoding.tables import PROBABILITY_BITS, TOTAL, contexts, frequencies, trellis_offset

__all__ = ["LANE", "Packed", "coded_bytes", "decoded", "encoded", "is_codable", "is_walk", "overhead_bytes"]

Array = NDArray[Any]
LANE = 1 << 14
_MOST_SIZE = 256
_PLAIN = 4
_HEAD = 5
_LANE_BYTES = 6


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A stream, and what has to be known to read it.

    Attributes:
        content: uint8 `[bytes]`.
        count: codes in all.
        size: number of different codes.
    """

    content: Tensor
    count: int
    size: int


def is_codable(size: int, columns: int) -> bool:
    """Whether codes can be put into a stream.

    Args:
        size: number of different codes.
        columns: codes in a row.
    """
    return 2 <= size <= _MOST_SIZE and 0 < columns <= 4 * LANE


def is_walk(codes: Tensor, size: int) -> bool:
    """Whether codes are those of a trellis.

    Args:
        codes: integers `[rows, columns]`.
        size: number of different codes.
    """
    return trellis_offset(codes.cpu().numpy(), size) is not None


def coded_bytes(codes: Tensor, size: int) -> int:
    """The length of a stream by its frequencies, without coding it: at most a little above its real length.

    Args:
        codes: integers `[rows, columns]`.
        size: number of different codes.
    """
    array = codes.cpu().numpy()
    offset = trellis_offset(array, size)
    coder = _coder(array, size, offset)
    counts = numpy.bincount(array.ravel(), minlength=size)
    bits = float(counts @ -numpy.log2(numpy.maximum(coder.frequencies, 1) / TOTAL))
    rows, columns = array.shape
    return overhead_bytes(rows, columns, size) + math.ceil(bits / 8)


def overhead_bytes(rows: int, columns: int, size: int) -> int:
    """What a stream holds beside its words.

    Args:
        rows, columns: of the codes.
        size: number of different codes.
    """
    return _HEAD + _table_bytes(size) + _LANE_BYTES * len(_lane_rows(rows, columns))


def encoded(layers: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Streams of several layers' codes.

    Args:
        layers: the codes of each, integers `[rows, columns]`, and the number of different ones.

    Returns:
        the streams, uint8 `[bytes]`.
    """
    lanes: list[Lane] = []
    parts: list[Array] = []
    heads: list[tuple[bytes, int]] = []
    for codes, size in layers:
        array = codes.cpu().numpy()
        offset = trellis_offset(array, size)
        coder = _coder(array, size, offset)
        rows = _lane_rows(*array.shape)
        table = pack(torch.from_numpy(coder.frequencies), PROBABILITY_BITS).numpy().tobytes()
        form = _PLAIN if offset is None else offset
        heads.append((bytes([form]) + array.shape[1].to_bytes(4, "little") + table, len(rows)))
        for start, end in rows:
            parts.append(array[start:end].ravel())
            lanes.append(Lane(coder=coder, columns=array.shape[1], length=len(parts[-1])))
    results = iter(encode_lanes(lanes, parts))
    return [_joined(head, [next(results) for _ in range(count)]) for head, count in heads]


def _joined(head: bytes, lanes: Sequence[tuple[int, Array]]) -> Tensor:
    counts = numpy.array([len(words) for _, words in lanes], dtype="<u2")
    states = numpy.array([state for state, _ in lanes], dtype="<u4")
    words = [words.astype("<u2").tobytes() for _, words in lanes]
    content = b"".join([head, counts.tobytes(), states.tobytes(), *words])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def decoded(streams: Sequence[Packed]) -> list[Tensor]:
    """The inverse of `encoded`.

    Time and memory depend on the number of codes, which the caller knows, and not on what a stream says.

    Returns:
        uint8 `[rows, columns]` of each stream.

    Raises:
        ValueError: a stream is damaged.
    """
    lanes: list[Lane] = []
    states: list[int] = []
    words: list[Array] = []
    columns = []
    for stream in streams:
        own, own_states, own_words = _opened(stream)
        columns.append((own[0].columns, len(own)))
        lanes, states, words = lanes + own, states + own_states, words + own_words
    parts = iter(decode_lanes(lanes, states, words))
    return [
        torch.from_numpy(numpy.concatenate([next(parts) for _ in range(count)]).reshape(-1, width))
        for width, count in columns
    ]


def _opened(stream: Packed) -> tuple[list[Lane], list[int], list[Array]]:
    """A stream's lanes, their states and their words."""
    if stream.content.dtype != torch.uint8 or stream.content.ndim != 1:
        raise ValueError(f"a stream is bytes, found {stream.content.dtype} {list(stream.content.shape)}")
    content = stream.content.cpu().numpy().tobytes()
    table_end = _HEAD + _table_bytes(stream.size)
    form, columns = content[0] if content else _PLAIN + 1, int.from_bytes(content[1:_HEAD], "little")
    if form > _PLAIN or not is_codable(stream.size, columns) or stream.count % columns or len(content) < table_end:
        raise ValueError(f"the stream does not begin like one of {stream.count} codes, {stream.size} different ones")
    coder = _read_coder(content[_HEAD:table_end], stream.size, None if form == _PLAIN else form)
    rows = _lane_rows(stream.count // columns, columns)
    words_at = table_end + _LANE_BYTES * len(rows)
    counts = numpy.frombuffer(content[table_end : table_end + 2 * len(rows)], dtype="<u2")
    states = numpy.frombuffer(content[table_end + 2 * len(rows) : words_at], dtype="<u4")
    if len(states) != len(rows) or len(content) != words_at + 2 * int(counts.sum()) or (states < LOW).any():
        raise ValueError(f"the stream has {len(content)} bytes, which is not what its lanes take")
    words = numpy.split(numpy.frombuffer(content[words_at:], dtype="<u2"), counts.cumsum()[:-1])
    lanes = [Lane(coder=coder, columns=columns, length=(end - start) * columns) for start, end in rows]
    return lanes, states.tolist(), words


def _read_coder(table: bytes, size: int, offset: int | None) -> Coder:
    found = unpack(torch.frombuffer(bytearray(table), dtype=torch.uint8), PROBABILITY_BITS, size).numpy()
    of = contexts(size, offset)
    tables = 1 if offset is None else 2
    if any(int(found[of == context].sum()) != TOTAL for context in range(tables)):
        raise ValueError(f"the stream's frequencies do not sum to {TOTAL}")
    return Coder(frequencies=found, offset=offset)


def _coder(codes: Array, size: int, offset: int | None) -> Coder:
    """The coder that suits some codes `[rows, columns]`."""
    counts = numpy.bincount(codes.ravel(), minlength=size)
    of = contexts(size, offset)
    found = numpy.empty(size, dtype=numpy.int64)
    for context in range(int(of.max()) + 1):
        found[of == context] = frequencies(counts[of == context])
    return Coder(frequencies=found, offset=offset)


def _lane_rows(rows: int, columns: int) -> list[tuple[int, int]]:
    """The first row of each lane, and the one after its last."""
    step = max(1, LANE // columns)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _table_bytes(size: int) -> int:
    return -(-PROBABILITY_BITS * size // 8)
