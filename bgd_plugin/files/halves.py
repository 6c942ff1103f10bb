"""Numbers in half precision, in two parts: the high bytes, which repeat, as a stream, and what is left of the low ones.

The high byte has the sign, the exponent and two bits of the fraction: numbers of similar size take
about half its bits. The low byte is noise; its last bits are left out where a whole tensor has none, as after
`round_to_bits`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.encoding.codes import pack, unpack

__all__ = ["HALVES", "LOW", "Halves", "low_bits", "shapes_of"]

HALVES = "halves"
LOW = "/low"
"""Ends the name of the tensor with a group's low bytes."""
_BYTE = 8
_NAME = re.compile(r"#half([0-8])(\..*)?")


@dataclass(kw_only=True)
class Halves:
    """Tensors in half precision; those with as many bits and with the same last part of the name make up a group.

    Attributes:
        high: by group, the high bytes of its tensors one after another, integers `[count, 1]`.
        low: by group, the bits of the low bytes that are not all zero, integers `[count]`.
        members: by group, `[name, shape]` of each of its tensors.
    """

    high: dict[str, Tensor] = field(default_factory=dict)
    low: dict[str, Tensor] = field(default_factory=dict)
    members: dict[str, list[list[Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Halves:
        """Those of some tensors, of any shape, that are in half precision, and have values."""
        found: dict[str, list[tuple[str, Tensor]]] = {}
        for name, value in sorted(tensors.items()):
            if value.dtype == torch.float16 and not value.is_meta and value.numel() and not name.startswith("#"):
                kind = name.rpartition(".")[2]
                found.setdefault(f"#half{_bits(value)}.{kind}", []).append((name, value))
        result = cls()
        for group, entries in sorted(found.items()):
            whole = torch.cat([_whole(value) for _, value in entries])
            result.high[group] = (whole >> _BYTE)[:, None]
            if bits := low_bits(group):
                result.low[group] = (whole & 0xFF) >> (_BYTE - bits)
            result.members[group] = [[name, list(value.shape)] for name, value in entries]
        return result

    def names(self) -> set[str]:
        """Of the tensors of all groups."""
        return {name for members in self.members.values() for name, _ in members}

    def packed_low(self, group: str) -> dict[str, Tensor]:
        """The low bits of a group, uint8 `[bytes]`, by the tensor's name in the file; nothing where all are zero."""
        return {group + LOW: pack(self.low[group], low_bits(group))} if group in self.low else {}

    def take_low_(self, group: str, tensors: dict[str, Tensor]) -> None:
        """Read the low bits of a group, uint8 `[bytes]`, from a file's `tensors`, and remove them there.

        Raises:
            ValueError: they are missing, or of another number than the group's tensors have.
        """
        bits = low_bits(group)
        if not bits:
            return
        packed = tensors.pop(group + LOW, None)
        if packed is None:
            raise ValueError(f"{group + LOW!r} is missing from the file")
        self.low[group] = unpack(packed, bits, sum(map(math.prod, shapes_of(self.members[group]))))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors again, by name, in their own shapes."""
        for group, members in self.members.items():
            whole = self.high[group].flatten().int() << _BYTE
            if group in self.low:
                whole |= self.low[group].int() << (_BYTE - low_bits(group))
            values = torch.where(whole < 1 << 15, whole, whole - (1 << 16)).to(torch.int16).view(torch.float16)
            shapes = shapes_of(members)
            for (name, shape), part in zip(members, torch.split(values, [math.prod(s) for s in shapes]), strict=True):
                yield name, part.reshape(shape).clone()


def low_bits(group: str) -> int:
    """How many bits of the low bytes a group has.

    Raises:
        ValueError: no group has such a name.
    """
    match = _NAME.fullmatch(group)
    if match is None:
        raise ValueError(f"{group!r} is no group of numbers in half precision")
    return int(match[1])


def shapes_of(members: Any) -> list[list[int]]:
    """Check the members of a group in a file's header; returns their shapes.

    Raises:
        ValueError: they are damaged.
    """
    shapes = []
    for member in members if isinstance(members, list) else [members]:
        match member:
            case [str(), [*shape]] if all(type(side) is int and 0 < side < 2**48 for side in shape):
                shapes.append(shape)
            case _:
                raise ValueError(f"{member!r} in a group of numbers in half precision is damaged")
    return shapes


def _whole(value: Tensor) -> Tensor:
    """The 16 bits of each number, int32 `[count]`."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.int16).int() & 0xFFFF


def _bits(value: Tensor) -> int:
    """How many bits of the low bytes are not zero in all numbers, counted from the top."""
    low = _whole(value) & 0xFF
    return next(bits for bits in range(_BYTE + 1) if not bool((low & (0xFF >> bits)).any()))
