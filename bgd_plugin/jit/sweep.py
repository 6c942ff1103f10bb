"""Sweeps over the blocks of rows as compiled code: a row's choices, and what each changes in its later blocks.

A panel of some columns stays in the caches while all its blocks are visited; of rows, which are independent, several
share the loads of the codewords. The plain way, `pq.feedback` and `pq.least_squares`, visits one block of all rows
after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bgd_plugin.jit.llvm import Loop, compiled, define, rows_together
from bgd_plugin.jit.nearest import LANES, POINTS, addresses_in, nearest_codes, searched
from bgd_plugin.jit.switch import enabled
from bgd_plugin.jit.threads import share_rows
from bgd_plugin.jit.vectors import constant, fma, load, splat, spread, store, total, zero

__all__ = ["can_sweep", "encode_", "refine_"]

_LARGEST_BLOCK = 16
"""Weights in a block: more of them do not fit in one vector."""
_MOST_ON_A_LINE = 512
"""Codewords of one weight above which a binary search for the nearest is less work."""


def can_sweep(values: Tensor, codebook: Tensor) -> bool:
    """Whether sweeps of this kind are compiled: single precision, on a CPU, with the extra `fast`.

    Args:
        values: any shape.
        codebook: `[codebook_size, block_size]`.
    """
    codewords, block_size = codebook.shape
    small = block_size <= _LARGEST_BLOCK and (block_size > 1 or codewords <= _MOST_ON_A_LINE)
    return values.is_cpu and values.dtype == torch.float32 and small and values.numel() > 0 and enabled()


def encode_(codes: Tensor, values: Tensor, matrix: Tensor, metrics: Tensor, codebook: Tensor) -> Tensor:
    """Choose for each block x of a panel the codeword c with the least ‖(x − c) M‖, and carry the error a = (x − c) M.

    Later blocks of the panel become x_J − a U_J.

    Args:
        codes: int64 `[groups, rows, blocks]`, overwritten.
        values: float32 `[groups, rows, columns]`.
        matrix: U, `[groups, columns, columns]`; what lies above its diagonal blocks is read.
        metrics: M, `[groups, blocks, block_size, block_size]`.
        codebook: `[codebook_size, block_size]`.

    Returns:
        a, `[groups, rows, columns]`.
    """
    centre = codebook.mean(0)  # float32 loses accuracy in differences of large numbers
    return _sweep_(
        False, codes, values, matrix, metrics, (codebook - centre) @ metrics, codebook, centre.expand(len(values), -1)
    )


def refine_(
    codes: Tensor, slope: Tensor, matrix: Tensor, turns: Tensor, metrics: Tensor, own: Tensor, codebook: Tensor
) -> Tensor:
    """Choose for each block of a panel the codeword nearest to ŵ + G H⁻¹ if that lowers the loss; a = new ŵ − old ŵ.

    The slope G of later blocks of the panel becomes G_J − a H_J.

    Args:
        codes: int64 `[groups, rows, blocks]`: those of ŵ, overwritten.
        slope: G, float32 `[groups, rows, columns]`.
        matrix: H, `[groups, columns, columns]`; what lies above its diagonal blocks is read.
        turns: H⁻¹ L of each diagonal block H = L Lᵀ, `[groups, blocks, block_size, block_size]`.
        metrics: L, `[groups, blocks, block_size, block_size]`.
        own: the diagonal blocks themselves, `[groups, blocks, block_size, block_size]`.
        codebook: `[codebook_size, block_size]`.

    Returns:
        a, `[groups, rows, columns]`.
    """
    return _sweep_(True, codes, slope, matrix, turns, (codebook - codebook.mean(0)) @ metrics, codebook, own)


def _sweep_(
    refines: bool,
    codes: Tensor,
    values: Tensor,
    matrix: Tensor,
    turns: Tensor,
    moved: Tensor,
    codebook: Tensor,
    extra: Tensor,
) -> Tensor:
    """Run the program on each group.

    Args:
        moved: the codewords as they are compared, `[groups, blocks, codebook_size, block_size]`.
        extra: own Grams if codes are refined, else the centre; `[groups, ...]`.
    """
    (groups, rows, columns), block_size = values.shape, codebook.shape[1]
    lanes, spare = _lanes(block_size), -columns % LANES + LANES
    values = functional.pad(values, (0, spare))
    block = torch.arange(columns, device=values.device) // block_size
    later = functional.pad(matrix * (block > block.unsqueeze(1)), (0, spare))
    turns, extra, words = (functional.pad(x, (0, lanes - block_size)) for x in (turns, extra, codebook))
    tables, norms = searched(moved)
    chunks = norms.shape[-1] // LANES
    factors = torch.empty_like(values)
    words = words.contiguous().expand(groups, -1, -1)
    own = [x.contiguous() for x in (values, later, turns, tables, norms)]
    operands = [*own, words, extra.contiguous(), codes, factors]
    program, numbers = _program(block_size, refines), (codes.shape[2], chunks, values.shape[2], codes.stride(1))
    for group in range(groups):
        call = partial(_call, addresses_in(group, operands), numbers)
        share_rows(rows, chunks * codes.shape[2], program, call)
    return factors[:, :, :columns]


def _call(addresses: list[int], numbers: tuple[int, ...], first: int, last: int) -> list[tuple[int, ...]]:
    return [(*addresses, first, last, *numbers)]


def _lanes(block_size: int) -> int:
    """Of the vector that holds a block: a power of two."""
    return 1 << (block_size - 1).bit_length()


@cache
def _program(block_size: int, refines: bool) -> Any:
    """All blocks of a panel, for the rows `first` to `last`."""
    from llvmlite import ir

    pointers = ("values", "matrix", "turns", "tables", "norms", "words", "extra", "codes", "factors")
    numbers = ("first", "last", "blocks", "chunks", "stride", "code_stride")
    module, builder, a = define("sweep", pointers, numbers)
    for rows in rows_together(builder, a["first"], a["last"], POINTS):
        with Loop(builder, ir.IntType(64)(0), a["blocks"]) as blocks:
            _visit(builder, a, rows, blocks.index, block_size, refines)
    builder.ret_void()
    return compiled(module)


def _visit(builder: Any, a: dict[str, Any], rows: list[Any], block: Any, size: int, refines: bool) -> None:
    """One block of some rows."""
    from llvmlite import ir

    whole, lanes = ir.IntType(64), _lanes(size)
    here = builder.mul(block, whole(size))
    starts = [builder.mul(row, a["stride"]) for row in rows]
    places = [builder.add(start, here) for start in starts]
    codes = [
        builder.gep(a["codes"], [builder.add(builder.mul(row, a["code_stride"]), block)], source_etype=whole)
        for row in rows
    ]
    values = [load(builder, a["values"], place, lanes) for place in places]
    choose = _refined if refines else _encoded
    factors = choose(_Block(builder=builder, a=a, index=block, size=size), codes, values)
    for place, factor in zip(places, factors, strict=True):
        store(builder, factor, a["factors"], place)
    _change(builder, a, starts, here, [_spread(builder, builder.fsub(zero(lanes), f), size) for f in factors])


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What is read of a block: its own matrices, and the codewords as they are compared there."""

    builder: Any
    a: dict[str, Any]
    index: Any
    size: int

    def matrix(self, name: str) -> list[Any]:
        """The rows of the block's own matrix among those of this name."""
        return [
            load(self.builder, self.a[name], self.scaled(self.row(i), _lanes(self.size)), _lanes(self.size))
            for i in range(self.size)
        ]

    def row(self, place: int) -> Any:
        """The panel's column number `place` of the block."""
        return self.builder.add(self.scaled(self.index, self.size), self.index.type(place))

    def scaled(self, number: Any, factor: int) -> Any:
        return self.builder.mul(number, number.type(factor))

    @property
    def width(self) -> Any:
        """Codewords in a row of the tables."""
        return self.scaled(self.a["chunks"], LANES)

    @property
    def tables(self) -> Any:
        from llvmlite import ir

        place = self.builder.mul(self.row(0), self.width)
        return self.builder.gep(self.a["tables"], [place], source_etype=ir.FloatType())

    def nearest(self, points: list[list[Any]]) -> list[Any]:
        """The codes of the codewords nearest to points whose numbers are spread."""
        from llvmlite import ir

        place = self.builder.mul(self.index, self.width)
        norms = self.builder.gep(self.a["norms"], [place], source_etype=ir.FloatType())
        return nearest_codes(self.builder, points, self.tables, norms, self.a["chunks"])

    def word(self, code: Any) -> Any:
        return load(self.builder, self.a["words"], self.scaled(code, _lanes(self.size)), _lanes(self.size))


def _encoded(block: _Block, codes: list[Any], values: list[Any]) -> list[Any]:
    """Choose codewords and store the codes; the errors times the metric."""
    builder, turns = block.builder, block.matrix("turns")
    centre = load(builder, block.a["extra"], block.index.type(0), _lanes(block.size))
    moved = [_product(builder, builder.fsub(value, centre), turns) for value in values]
    chosen = block.nearest([_spread(builder, point, block.size) for point in moved])
    for home, code in zip(codes, chosen, strict=True):
        builder.store(code, home, align=8)
    errors = [builder.fsub(value, block.word(code)) for value, code in zip(values, chosen, strict=True)]
    return [_product(builder, error, turns) for error in errors]


def _refined(block: _Block, codes: list[Any], values: list[Any]) -> list[Any]:
    """Choose codewords, and store the codes of those that lower the loss; the steps, zero where it is not lowered."""
    builder, turns = block.builder, block.matrix("turns")
    old = [builder.load(home, typ=block.index.type, align=8) for home in codes]
    points = [_spread(builder, _product(builder, value, turns), block.size) for value in values]
    half = constant(None, LANES, -0.5)  # tables hold the codewords times -2
    for point, code in zip(points, old, strict=True):
        for j in range(block.size):
            place = builder.add(block.scaled(block.width, j), code)
            point[j] = fma(builder, splat(builder, load(builder, block.tables, place, 1), LANES), half, point[j])
    steps, own = [], block.matrix("extra")
    for home, code, before, value in zip(codes, block.nearest(points), old, values, strict=True):
        step = builder.fsub(block.word(code), block.word(before))
        is_lower = _is_lower(builder, value, step, own)
        builder.store(builder.select(is_lower, code, before), home, align=8)
        steps.append(builder.select(is_lower, step, zero(step.type.count)))
    return steps


def _is_lower(builder: Any, slope: Any, step: Any, own: list[Any]) -> Any:
    """Whether a step m lowers the loss: m · (2 G − m H) > 0."""
    from llvmlite import ir

    gain = builder.fsub(builder.fadd(slope, slope), _product(builder, step, own))
    lowered = total(builder, builder.fmul(step, gain), step.type.count)
    return builder.fcmp_ordered(">", lowered, ir.FloatType()(0.0))


def _change(builder: Any, a: dict[str, Any], starts: list[Any], here: Any, factors: list[list[Any]]) -> None:
    """Add factors times the rows of the matrix from `here` on to the values behind; the matrix is 0 up to there."""
    from llvmlite import ir

    whole, size = ir.IntType(64), len(factors[0])
    first = builder.sdiv(builder.add(here, whole(size)), whole(LANES))
    last = builder.sub(builder.sdiv(a["stride"], whole(LANES)), whole(1))
    above = [builder.mul(builder.add(here, whole(i)), a["stride"]) for i in range(size)]
    with Loop(builder, first, last) as chunk:
        column = builder.mul(chunk.index, whole(LANES))
        matrix = [load(builder, a["matrix"], builder.add(row, column), LANES) for row in above]
        for start, factor in zip(starts, factors, strict=True):
            place = builder.add(start, column)
            value = load(builder, a["values"], place, LANES)
            for x, row in zip(factor, matrix, strict=True):
                value = fma(builder, x, row, value)
            store(builder, value, a["values"], place)


def _product(builder: Any, vector: Any, matrix: list[Any]) -> Any:
    """A row vector times a matrix, given by its rows."""
    result = zero(vector.type.count)
    for i, row in enumerate(matrix):
        result = fma(builder, spread(builder, vector, i, row.type.count), row, result)
    return result


def _spread(builder: Any, vector: Any, size: int) -> list[Any]:
    """Each of a vector's first numbers in all lanes."""
    return [spread(builder, vector, i, LANES) for i in range(size)]
