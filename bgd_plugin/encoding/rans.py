"""Asymmetric numeral systems: many lanes of codes, encoded and decoded side by side in numpy.

A lane's state is an integer in [2^16, 2^32). To encode a code of frequency f and cumulated frequency c, the state x
becomes (x div f) · 2^12 + (x mod f) + c, after its low 16 bits have gone to the lane's words if it would grow beyond 32
bits. Decoding undoes this: the low 12 bits tell the code. Lanes are encoded from their last code to their first.

**Source**: Duda, "Asymmetric numeral systems", arXiv 1311.2540; lanes after Giesen, "Interleaved entropy coders", arXiv
1402.3392, but each with words of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from bgd_plugin.encoding.tables import NEXT_STATE, PROBABILITY_BITS, STATES, TOTAL, contexts

__all__ = ["LOW", "Coder", "Lane", "decode_lanes", "encode_lanes"]

Array = NDArray[Any]
LOW = 1 << 16
"""The least state, with which every lane's encoding starts and its decoding ends."""
_TOGETHER = 1024
"""Lanes that step together."""


@dataclass(frozen=True, kw_only=True)
class Coder:
    """How the codes of one layer are coded.

    Attributes:
        frequencies: int64 `[size]`; those of each context sum to `TOTAL`.
        offset: of the first code in the trellis' grid; None without a trellis.
    """

    frequencies: Array
    offset: int | None

    def starts(self) -> Array:
        """The cumulated frequencies of the codes before each code in its context, `[size]`."""
        starts = numpy.empty_like(self.frequencies)
        of = contexts(len(starts), self.offset)
        for context in range(int(of.max()) + 1):
            own = self.frequencies[of == context]
            starts[of == context] = own.cumsum() - own
        return starts


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Codes that are coded one after another: whole rows of a layer.

    Attributes:
        coder: of the layer.
        columns: codes in a row; the trellis starts anew at each row.
        length: codes in all.
    """

    coder: Coder
    columns: int
    length: int


def encode_lanes(lanes: Sequence[Lane], codes: Sequence[Array]) -> list[tuple[int, Array]]:
    """The final state of each lane, and its words, uint16, in the order in which they are read.

    Args:
        lanes: what they hold.
        codes: integers `[length]` of each lane.
    """
    order = sorted(range(len(lanes)), key=lambda i: -lanes[i].length)
    results: list[tuple[int, Array]] = [(LOW, numpy.empty(0, dtype=numpy.uint16))] * len(lanes)
    for start in range(0, len(order), _TOGETHER):
        some = order[start : start + _TOGETHER]
        encoded = _encoded([lanes[i] for i in some], [codes[i] for i in some])
        for i, result in zip(some, encoded, strict=True):
            results[i] = result
    return results


def _encoded(lanes: Sequence[Lane], codes: Sequence[Array]) -> list[tuple[int, Array]]:
    coders, places = _distinct(lanes)
    frequency = numpy.concatenate([coder.frequencies for coder in coders]).astype(numpy.uint32)
    start = numpy.concatenate([coder.starts() for coder in coders]).astype(numpy.uint32)
    firsts = numpy.cumsum([0, *(len(coder.frequencies) for coder in coders)])
    lengths = [lane.length for lane in lanes]
    symbols = numpy.zeros((lengths[0], len(lanes)), dtype=numpy.int32)
    for i, own in enumerate(codes):
        symbols[: len(own), i] = own.astype(numpy.int32) + firsts[places[i]]
    active = _active(lengths)
    state = numpy.full(len(lanes), LOW, dtype=numpy.uint32)
    words = numpy.empty((len(lanes), lengths[0] + 1), dtype=numpy.uint16)
    written = numpy.zeros(len(lanes), dtype=numpy.int64)
    for step in range(lengths[0] - 1, -1, -1):
        x, symbol = state[: active[step]], symbols[step, : active[step]]
        f = frequency[symbol]
        full = numpy.flatnonzero(x >= f << numpy.uint32(32 - PROBABILITY_BITS))
        words[full, written[full]] = x[full]
        written[full] += 1
        x[full] >>= numpy.uint32(16)
        quotient = x // f
        x += (quotient << numpy.uint32(PROBABILITY_BITS)) - quotient * f + start[symbol]
        state[: active[step]] = x
    return [(int(state[i]), words[i, : written[i]][::-1].copy()) for i in range(len(lanes))]


def decode_lanes(lanes: Sequence[Lane], states: Sequence[int], words: Sequence[Array]) -> list[Array]:
    """The inverse of `encode_lanes`.

    Args:
        lanes: what they hold.
        states: of each lane, 2^16 or above.
        words: uint16, of each lane.

    Returns:
        the codes of each lane, uint8 `[length]`.

    Raises:
        ValueError: a lane's words do not end with its last code.
    """
    order = sorted(range(len(lanes)), key=lambda i: -lanes[i].length)
    results: list[Array] = [numpy.empty(0, dtype=numpy.uint8)] * len(lanes)
    for start in range(0, len(order), _TOGETHER):
        some = order[start : start + _TOGETHER]
        decoded = _decoded([lanes[i] for i in some], [states[i] for i in some], [words[i] for i in some])
        for i, result in zip(some, decoded, strict=True):
            results[i] = result
    return results


def _decoded(lanes: Sequence[Lane], states: Sequence[int], words: Sequence[Array]) -> list[Array]:
    coders, places = _distinct(lanes)
    tables = _Tables(coders)
    lengths = [lane.length for lane in lanes]
    active = _active(lengths)
    ends = numpy.cumsum([len(own) for own in words])
    position = ends - [len(own) for own in words]
    stream = numpy.concatenate([*words, numpy.zeros(1, dtype=numpy.uint16)]).astype(numpy.uint32)
    state = numpy.array(states, dtype=numpy.uint32)
    first = numpy.array(places, dtype=numpy.int64) * STATES  # of the trellis, at the start of a row
    trellis, columns = first.copy(), numpy.array([lane.columns for lane in lanes])
    left = columns.copy()
    codes = numpy.empty((lengths[0], len(lanes)), dtype=numpy.uint8)
    for step in range(lengths[0]):
        n = active[step]
        x = state[:n]
        slot = tables.of_state[trellis[:n]] + (x & numpy.uint32(TOTAL - 1))
        codes[step, :n] = tables.code[slot]
        x = tables.frequency[slot] * (x >> numpy.uint32(PROBABILITY_BITS)) + tables.rest[slot]
        low = x < LOW
        at = position[:n]
        state[:n] = numpy.where(low, x << numpy.uint32(16) | stream[numpy.minimum(at, len(stream) - 1)], x)
        at += low
        trellis[:n] = tables.next_state[2 * trellis[:n] + tables.bit[slot]]
        left[:n] -= 1
        over = numpy.flatnonzero(left[:n] == 0)
        if len(over):
            left[over], trellis[over] = columns[over], first[over]
    if (position != ends).any() or (state != LOW).any():
        raise ValueError("the words of a lane do not end with its last code")
    return [codes[: lengths[i], i] for i in range(len(lanes))]


class _Tables:
    """What decoding looks up: by slot (a table's 2^12 places, all tables one after another), and by trellis state."""

    def __init__(self, coders: Sequence[Coder]) -> None:
        parts: list[tuple[Array, ...]] = []
        self.of_state = numpy.empty(STATES * len(coders), dtype=numpy.int64)
        moves = numpy.repeat(numpy.arange(STATES * len(coders)), 2).reshape(-1, STATES, 2)
        for i, coder in enumerate(coders):
            of = contexts(len(coder.frequencies), coder.offset)
            tables = range(2 if coder.offset is not None else 1)
            for state in range(STATES):
                self.of_state[STATES * i + state] = TOTAL * (len(parts) + (state & 1 if len(tables) == 2 else 0))
            if coder.offset is not None:
                moves[i] = STATES * i + NEXT_STATE
            starts = coder.starts()
            for table in tables:
                own = numpy.flatnonzero(of == table)
                code = numpy.repeat(own, coder.frequencies[own])
                rest = numpy.arange(TOTAL) - starts[code]
                parts.append((code, coder.frequencies[code], rest, code + (coder.offset or 0) >> 1 & 1))
        code, frequency, rest, bit = (numpy.concatenate(columns) for columns in zip(*parts, strict=True))
        self.code, self.bit = code.astype(numpy.uint8), bit.astype(numpy.int64)
        self.frequency, self.rest = frequency.astype(numpy.uint32), rest.astype(numpy.uint32)
        self.next_state = moves.reshape(-1)


def _distinct(lanes: Sequence[Lane]) -> tuple[list[Coder], list[int]]:
    """The coders of some lanes, and the place of each lane's among them."""
    places: dict[int, int] = {}
    coders: list[Coder] = []
    for lane in lanes:
        if places.setdefault(id(lane.coder), len(coders)) == len(coders):
            coders.append(lane.coder)
    return coders, [places[id(lane.coder)] for lane in lanes]


def _active(lengths: Sequence[int]) -> list[int]:
    """How many lanes, longest first, have a code at each step."""
    counts = numpy.bincount(numpy.array(lengths), minlength=lengths[0] + 1)
    result: list[int] = (len(lengths) - counts.cumsum())[: lengths[0]].tolist()
    return result
