"""Numbers on a grid, found by their values: small integers times one step, collected by the bits that they take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = ["GRIDS", "STEPS", "Grids", "group_size", "is_on_grid", "members_of"]

GRIDS = "grids"
STEPS = "#steps"
_LARGEST = 127
_SHOWN = 4096
_HALF_UNIT = 2.0**24
"""Each finite number in half precision is a whole multiple of 2^-24."""


@dataclass(kw_only=True)
class Grids:
    """Tensors on grids.

    Attributes:
        numbers: by group, the integers of its tensors one after another, int64 `[count, 1]`, from 0 up.
        members: by group, `[name, shape, has step]` of each of its tensors: those without a step were 8-bit integers.
        steps: of those with one, in the order of the groups and of their members.
    """

    numbers: dict[str, Tensor] = field(default_factory=dict)
    members: dict[str, list[list[Any]]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Grids:
        """Those of some tensors, of any shape, that are on a grid."""
        found: dict[str, list[tuple[str, Tensor, float | None]]] = {}
        for name, value in sorted(tensors.items()):
            grid = None if value.is_meta or not value.numel() or name.startswith("#") else _on_grid(value)
            if grid is not None:
                bits = max(1, int(grid[0].abs().max()).bit_length())
                found.setdefault(f"#grid{bits}{'v' if value.ndim == 1 else ''}", []).append((name, *grid))
        result = cls()
        for group, entries in sorted(found.items()):
            middle = group_size(group) // 2
            result.numbers[group] = torch.cat([numbers.flatten() + middle for _, numbers, _ in entries])[:, None]
            result.members[group] = [[name, list(x.shape), step is not None] for name, x, step in entries]
            result.steps += [step for *_, step in entries if step is not None]
        return result

    def names(self) -> set[str]:
        """Of the tensors on grids."""
        return {name for members in self.members.values() for name, *_ in members}

    def has_weights(self) -> bool:
        """Whether a tensor in half precision that is not a vector is among them."""
        return any(has_step and len(shape) > 1 for members in self.members.values() for _, shape, has_step in members)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors again, by name, in their own shapes.

        Raises:
            ValueError: integers or steps do not suit the members.
        """
        steps = iter(self.steps)
        for group, members in self.members.items():
            numbers, middle = self.numbers[group].flatten().long(), group_size(group) // 2
            sizes = [math.prod(shape) for _, shape, _ in members]
            if sum(sizes) != numbers.numel():
                raise ValueError(f"{group!r} has {numbers.numel()} numbers, its tensors have {sum(sizes)}")
            for (name, shape, has_step), part in zip(members, torch.split(numbers, sizes), strict=True):
                whole = (part - middle).reshape(shape)
                yield name, (whole.double() * next(steps)).half() if has_step else whole.to(torch.int8)


def is_on_grid(value: Tensor) -> bool:
    """Whether `value`, in half precision and of any shape, holds small integers times one step."""
    return _on_grid(value) is not None


def group_size(group: str) -> int:
    """How many different integers a group has: 2^(bits + 1) − 1.

    Raises:
        ValueError: no group has such a name.
    """
    bits = group.removeprefix("#grid").removesuffix("v")
    if not group.startswith("#grid") or bits not in list("1234567"):
        raise ValueError(f"{group!r} is no group of numbers on a grid")
    return int(2 ** (int(bits) + 1)) - 1


def members_of(entry: Any) -> list[list[Any]]:
    """Check a group's members, `entry` in a file's header.

    Raises:
        ValueError: they are damaged.
    """
    if not isinstance(entry, list):
        raise ValueError("a group of numbers on a grid is damaged")
    for member in entry:
        match member:
            case [str(), [*shape], bool()] if all(type(side) is int and 0 < side < 2**48 for side in shape):
                pass
            case _:
                raise ValueError(f"{member!r} in a group of numbers on a grid is damaged")
    return entry


def _units(value: Tensor) -> Tensor:
    return (value.double() * _HALF_UNIT).long()


def _unit(units: Tensor) -> int:
    """The greatest common divisor; 1 of zeros."""
    return int(numpy.gcd.reduce(units.numpy().ravel())) or 1


def _on_grid(value: Tensor) -> tuple[Tensor, float | None] | None:
    """A tensor's integers, and their step in half precision; None if it is on no grid."""
    if value.dtype == torch.int8:
        return (value.long(), None) if int(value.min()) >= -_LARGEST else None
    if value.dtype != torch.float16 or not bool(torch.isfinite(value).all()):
        return None
    flat = value.reshape(-1).cpu()
    if _unit(some := _units(flat[:_SHOWN])) * _LARGEST < int(some.abs().max()):
        return None  # without a look at all of a large tensor
    units = _units(flat).reshape(value.shape)
    unit = _unit(units)
    numbers, step = units // unit, unit / _HALF_UNIT
    is_plain = int(numbers.abs().max()) <= _LARGEST and not bool((torch.signbit(value) & (value == 0)).any())
    return (numbers, step) if is_plain and float(torch.tensor(step).half()) == step else None
