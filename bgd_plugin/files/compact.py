"""What format 3 saves: codes as entropy-coded streams, numbers on a grid as integers, where that makes them shorter.

Nothing is lost, and nothing but a file's bytes changes: once read, its content is that of format 2. A file is written
in format 3 if codes of a trellis are among its codes, or if weights are on a grid: so the length of a file of blocks is
known before they are. Then other codes are coded, too, where that saves enough; and numbers in half precision that are
small multiples of one step, and 8-bit integers, are collected by their bits, and packed or coded together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.encoding.codes import pack, unpack
from bgd_plugin.encoding.stream import Packed, coded_bytes, decoded, encoded, is_codable, is_walk
from bgd_plugin.files.grids import GRIDS, STEPS, Grids, group_size, members_of
from bgd_plugin.files.halves import HALVES, LOW, Halves, low_bits, shapes_of
from bgd_plugin.files.stored import Stored

__all__ = ["FILE_BYTES", "compacted", "expanded"]

FILE_BYTES = "file_bytes"
"""In an expanded content's header: the bytes of tensors in the file, where they are not those that they have here."""
STREAMS = "streams"
_FORMAT = 3
_BYTES = 256
_WORTH = 32
"""Codes are coded where that saves one part in so many."""
_MOST_CODES = 64
"""Codes for each byte of a stream: more are refused, since they would take more memory than a file should."""


def compacted(content: Stored, *, exact: bool = True) -> Stored | None:
    """A content as format 3 has it; None where it is not worth it.

    Args:
        content: as of format 2. A tensor on the meta device stays as it is.
        exact: False: streams are on the meta device, with their length or a little more.
    """
    found = {name: codes for name in content.columns if (codes := _worth_coding(content, name)) is not None}
    grids = Grids.of({name: x for name, x in content.tensors.items() if name not in content.columns})
    is_planned = bool(content.streams) or grids.has_weights()
    if not is_planned and not any(is_walk(*codes) for codes in found.values()):
        return None
    streams = dict(zip(found, _coded(list(found.values()), exact=exact), strict=True)) if found else {}
    halves = Halves.of({name: x for name, x in content.tensors.items() if name not in grids.names()})
    pieces: dict[str, Tensor] = {}
    names = [*streams, *content.streams]
    for group, numbers in grids.numbers.items():
        size = group_size(group)
        pieces[group] = pack(numbers, size.bit_length())
        if _is_worth_coding(numbers, size, pieces[group].numel()):
            names.append(group)
            (pieces[group],) = _coded([(numbers, size)], exact=exact)
    for group, numbers in list(halves.high.items()):
        if not _is_worth_coding(numbers, _BYTES, numbers.numel()):
            del halves.members[group]
            continue
        names.append(group)
        (pieces[group],) = _coded([(numbers, _BYTES)], exact=exact)
        pieces |= halves.packed_low(group)
    if grids.steps:
        pieces[STEPS] = torch.tensor(grids.steps, dtype=torch.float64).half()
    gone = grids.names() | halves.names()
    tensors = {name: x for name, x in content.tensors.items() if name not in gone} | streams | pieces
    number = max(_FORMAT, content.header["format"])
    header = {**content.header, "format": number, STREAMS: sorted(names), GRIDS: grids.members}
    return Stored(tensors=tensors, header=header | ({HALVES: halves.members} if halves.members else {}))


def _worth_coding(content: Stored, name: str) -> tuple[Tensor, int] | None:
    """The codes of a layer, `[rows, columns]`, and how many there are, if they are worth coding."""
    packed, columns = content.tensors[name], content.columns[name]
    size, count = _sizes(content.header, name)
    if packed.is_meta or not is_codable(size, columns) or not count:
        return None
    codes = unpack(packed, _bits(size), count, torch.uint8).reshape(-1, columns)
    return (codes, size) if _is_worth_coding(codes, size, packed.numel()) else None


def _is_worth_coding(codes: Tensor, size: int, packed_bytes: int) -> bool:
    length = coded_bytes(codes, size)
    return length * _WORTH <= packed_bytes * (_WORTH - 1) and 2 * codes.numel() <= _MOST_CODES * length


def _coded(layers: Sequence[tuple[Tensor, int]], *, exact: bool) -> list[Tensor]:
    if exact:
        return encoded(layers)
    return [torch.empty(coded_bytes(*layer), dtype=torch.uint8, device="meta") for layer in layers]


def expanded(content: Stored) -> Stored:
    """The content that a file of format 3 stands for: the inverse of `compacted`.

    Raises:
        ValueError: it is damaged.
    """
    tensors, header = dict(content.tensors), dict(content.header)
    names, entries, parts = header.pop(STREAMS, []), header.pop(GRIDS, {}), header.pop(HALVES, {})
    if not isinstance(entries, dict) or not isinstance(parts, dict) or not _are_names(names, tensors):
        raise ValueError("its header is damaged: it names streams that it does not have")
    grids = Grids(members={group: members_of(members) for group, members in entries.items()})
    halves = Halves(members=parts)
    grids.steps = _steps(tensors.pop(STEPS, torch.empty(0, dtype=torch.float16)), grids)
    counts = _counts(grids, halves)
    opened = dict(zip(names, _opened(content, names, counts), strict=True))
    for group in (*grids.members, *halves.members):
        packed = tensors.pop(group, None)
        if packed is None:
            raise ValueError(f"{group!r} is missing from the file")
        size, count = counts[group]
        numbers = opened[group] if group in opened else unpack(packed, size.bit_length(), count)
        if group in grids.members:
            grids.numbers[group] = numbers
        else:
            halves.high[group] = numbers
            halves.take_low_(group, tensors)
    for name in (name for name in names if name not in counts):
        tensors[name] = pack(opened[name], _bits(_sizes(header, name)[0]))
    for name, value in (*grids.tensors(), *halves.tensors()):
        if tensors.setdefault(name, value) is not value:
            raise ValueError(f"{name!r} is in the file twice")
    header[FILE_BYTES] = {name: content.tensors[name].numel() for name in names if name not in counts}
    for group, (_, count) in counts.items():
        length = sum(content.tensors[part].numel() for part in (group, group + LOW) if part in content.tensors)
        header[FILE_BYTES] |= {
            name: int(length / max(1, count) * tensors[name].numel()) for name in _members(grids, halves, group)
        }
    return Stored(tensors=tensors, header=header)


def _members(grids: Grids, halves: Halves, group: str) -> list[str]:
    return [name for name, *_ in (grids.members.get(group) or halves.members[group])]


def _counts(grids: Grids, halves: Halves) -> dict[str, tuple[int, int]]:
    """How many different numbers each group has, and how many numbers.

    Raises:
        ValueError: the header is damaged.
    """
    counts = {}
    for group, members in grids.members.items():
        counts[group] = group_size(group), sum(math.prod(shape) for _, shape, _ in members)
    for group, own in halves.members.items():
        low_bits(group)
        counts[group] = _BYTES, sum(math.prod(shape) for shape in shapes_of(own))
    return counts


def _steps(steps: Tensor, grids: Grids) -> list[float]:
    """The steps of grids, checked.

    Raises:
        ValueError: they are damaged, or not as many as there are tensors with one.
    """
    if steps.dtype != torch.float16 or steps.ndim != 1 or not bool(torch.isfinite(steps).all()):
        raise ValueError("the steps of grids are damaged")
    if len(steps) != sum(has_step for members in grids.members.values() for *_, has_step in members):
        raise ValueError("there are not as many steps as there are tensors on a grid")
    return list(steps.double().tolist())


def _opened(content: Stored, names: Sequence[str], counts: Mapping[str, tuple[int, int]]) -> list[Tensor]:
    streams = []
    for name in names:
        size, count = counts[name] if name in counts else _sizes(content.header, name)
        stream = content.tensors[name]
        if count > _MOST_CODES * stream.numel():
            raise ValueError(f"{name!r}: {stream.numel()} bytes are too few for {count} codes")
        streams.append(Packed(content=stream, count=count, size=size))
    return decoded(streams)


def _are_names(names: Any, tensors: Mapping[str, Tensor]) -> bool:
    return (
        isinstance(names, list)
        and all(isinstance(name, str) and name in tensors for name in names)
        and len(set(names)) == len(names)
    )


def _sizes(header: Mapping[str, Any], name: str) -> tuple[int, int]:
    """How many different codes a layer has, and how many codes, by its entry in the header.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = name.removesuffix(".codes")
    layers = header.get("layers")
    match layers.get(path) if isinstance(layers, dict) and path != name else None:
        case [str(), int(block_size), int(size), [*shape]] if (
            block_size > 0 and 2 <= size <= 2**16 and all(type(side) is int and 0 < side < 2**48 for side in shape)
        ):
            return size, math.prod(shape) // block_size
    raise ValueError(f"the layer of the codes {name!r} has no entry in the header, or a damaged one")


def _bits(size: int) -> int:
    """Bits of a packed code."""
    return max(1, math.ceil(math.log2(size)))
