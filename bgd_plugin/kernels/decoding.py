"""The decode kernel: rows of the weight, of any type, on as many threads as torch may use."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from bgd_plugin.jit.llvm import Loop, compiled, define, pieces, read_codes
from bgd_plugin.jit.threads import pays, share_rows

__all__ = ["decode_program", "decode_rows", "decode_rows_into"]


@cache
def decode_program(block_size: int, code_bits: int, value_bits: int) -> Any:
    """`output[r − first, i] = codebook[codes[r, i]]`: whole rows of the weight, of any type of `value_bits` bits.

    Args:
        block_size: d, the number of weights in a block.
        code_bits, value_bits: bits of a code and of a weight in memory.

    The function takes the addresses of codebook `[codebook_size, block_size]`, codes and output
    `[last − first, columns]`, then `first`, `last` and `blocks`.
    """
    from llvmlite import ir

    module, builder, a = define("decode", ("codebook", "codes", "output"), ("first", "last", "blocks"))
    whole, value = ir.IntType(64), ir.IntType(value_bits)
    together = 8

    def copy(row: Any, start: Any, count: int) -> None:
        base = builder.add(builder.mul(row, a["blocks"]), start)
        out = builder.mul(builder.sub(base, builder.mul(a["first"], a["blocks"])), whole(block_size))
        for i, code in enumerate(read_codes(builder, a["codes"], base, count, code_bits)):
            word = builder.mul(code, whole(block_size))
            for offset, lanes in pieces(block_size):
                kind = ir.VectorType(value, lanes)
                source = builder.gep(a["codebook"], [builder.add(word, whole(offset))], source_etype=value)
                target = builder.gep(
                    a["output"], [builder.add(out, whole(i * block_size + offset))], source_etype=value
                )
                builder.store(builder.load(source, typ=kind, align=value_bits // 8), target, align=value_bits // 8)

    with Loop(builder, a["first"], a["last"]) as rows:
        many = builder.and_(a["blocks"], whole(-together))
        with Loop(builder, whole(0), many, together) as blocks:
            copy(rows.index, blocks.index, together)
        with Loop(builder, many, a["blocks"]) as rest:
            copy(rows.index, rest.index, 1)
    builder.ret_void()
    return compiled(module)


def decode_rows_into(output: Tensor, codebook: Tensor, codes: Tensor, first: int = 0) -> None:
    """Decode rows `first` and following into `output` `[count, columns]`, contiguous and of the codebook's type.

    Args:
        output: `[count, columns]`.
        codebook: `[codebook_size, block_size]`, contiguous.
        codes: `[rows, blocks_per_row]`, contiguous.
        first: index of the first row.
    """
    size, blocks, rows, item = codebook.shape[1], codes.shape[1], output.shape[0], codebook.element_size()
    program = decode_program(size, codes.element_size() * 8, item * 8)
    source, numbers, target = codebook.data_ptr(), codes.data_ptr(), output.data_ptr()
    if not pays(rows, blocks):
        program(source, numbers, target, first, first + rows, blocks)
        return
    row_bytes = blocks * size * item

    def calls(start: int, stop: int) -> list[tuple[int, ...]]:
        return [(source, numbers, target + start * row_bytes, first + start, first + stop, blocks)]

    share_rows(rows, blocks, program, calls)


def decode_rows(codebook: Tensor, codes: Tensor) -> Tensor:
    """All rows of the weight, `[rows, columns]`.

    Args:
        codebook: `[codebook_size, block_size]`, contiguous.
        codes: `[rows, blocks_per_row]`, contiguous.
    """
    output = codebook.new_empty(codes.shape[0], codes.shape[1] * codebook.shape[1])
    decode_rows_into(output, codebook, codes)
    return output
