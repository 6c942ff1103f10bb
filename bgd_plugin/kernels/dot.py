"""The dot kernel: one input times a quantized weight, codeword by codeword."""

from __future__ import annotations

from functools import cache
from typing import Any

from bgd_plugin.kernels.llvm import Loop, compiled, define, pieces, read_codes
from bgd_plugin.kernels.vectors import fma, load, masked, total, tree, zero

__all__ = ["dot_program"]


@cache
def dot_program(block_size: int, code_bits: int, has_mask: bool) -> Any:
    """`output[r] = Σ_i ⟨input block i, codeword of codes[r, i]⟩` for one input, in float32.

    A codeword is one or two vectors of the codebook, which lies in the innermost cache; the weight exists in registers
    alone. Several sums are kept apart, so that none waits for another.

    The function takes the addresses of input `[columns]`, codebook `[codebook_size, block_size]`, codes, mask (bytes
    `[rows, columns]`, where it has one) and output `[rows]`, then `first`, `last` and `blocks`.
    """
    from llvmlite import ir

    module, builder, a = define("dot", ("input", "codebook", "codes", "mask", "output"), ("first", "last", "blocks"))
    whole, single = ir.IntType(64), ir.FloatType()
    cuts = pieces(block_size)
    together = _unrolled(block_size)
    zeros = [zero(lanes) for _, lanes in cuts]

    def products(base: Any, start: Any, count: int, sums: list[Any]) -> list[Any]:
        """The sums with `count` more blocks; each block has its own, as long as there are so many."""
        result = list(sums)
        for i, code in enumerate(read_codes(builder, a["codes"], builder.add(base, start), count, code_bits)):
            at = builder.mul(builder.add(start, whole(i)), whole(block_size))
            word = builder.mul(code, whole(block_size))
            for j, (offset, lanes) in enumerate(cuts):
                x = load(builder, a["input"], builder.add(at, whole(offset)), lanes)
                if has_mask:
                    place = builder.add(builder.mul(base, whole(block_size)), builder.add(at, whole(offset)))
                    x = masked(builder, a["mask"], place, x, lanes)
                c = load(builder, a["codebook"], builder.add(word, whole(offset)), lanes)
                result[i * len(cuts) + j] = fma(builder, x, c, result[i * len(cuts) + j])
        return result

    with Loop(builder, a["first"], a["last"]) as rows:
        base = builder.mul(rows.index, a["blocks"])
        many = builder.and_(a["blocks"], whole(-together))
        with Loop(builder, whole(0), many, together, zeros * together) as blocks:
            blocks.carry(products(base, blocks.index, together, blocks.values))
        with Loop(builder, many, a["blocks"], 1, blocks.values) as rest:
            rest.carry(products(base, rest.index, 1, rest.values))
        result = single(0.0)
        for j, (_, lanes) in enumerate(cuts):
            result = builder.fadd(result, total(builder, tree(builder, rest.values[j :: len(cuts)]), lanes))
        builder.store(result, builder.gep(a["output"], [rows.index], source_etype=single), align=4)
    builder.ret_void()
    return compiled(module)


def _unrolled(block_size: int) -> int:
    """Blocks worked on at once: as many as their sums fit the registers."""
    vectors = len(pieces(block_size))
    return next((count for count in (8, 4, 2) if count * vectors <= 16), 1)
