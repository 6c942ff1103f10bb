"""Decoded weights of a Core ML program become look-up tables, and weights on an 8-bit grid become whole numbers.

A table has at most 256 codewords, its indices 1, 2, 3, 4, 6 or 8 bits; a codeword lies along one axis of the weight.
Blocks along the input channels of a linear layer or a 1x1 convolution therefore become a table of the weight itself,
which the Neural Engine supports; blocks of a larger kernel become a table of the matrix, followed by a reshape.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from bgd_plugin.encoding.eight_bit import to_eight_bits

__all__ = ["Tables"]

_INDEX_BITS = (1, 2, 3, 4, 6, 8)
_WEIGHTED = ("conv", "conv_transpose", "linear")
_SMALL = 512
"""Number of weights below which integers and scales save nothing."""


class Tables:
    """A pass over a Core ML program that runs before all others.

    Attributes:
        found: names of the tables' values, by the name of the codebook's value in the program.
        reshaped: codebooks whose weights are reshaped from a table of the matrix.
        dense: codebooks with more codewords than a table has; their weights are stored dense.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.reshaped: list[str] = []
        self.dense: list[str] = []

    def __call__(self, program: Any) -> None:
        """Rewrite a `coremltools` program in place."""
        from coremltools.converters.mil.mil import Builder
        from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

        # coremltools requires a source line for each operator; these have none
        sources = (ScopeSource.EXIR_STACK_TRACE, ScopeSource.EXIR_DEBUG_HANDLE)
        nowhere = [ScopeInfo(source=source, data=[None]) for source in sources]
        for function in program.functions.values():
            with function, Builder.scope(*nowhere):
                for op in list(function.operations):
                    if op.op_type == "gather" and _is_decoding(op):
                        self._replace_decoding_(function, op)
                for op in list(function.operations):
                    if op.op_type in _WEIGHTED and op.weight.val is not None:
                        _replace_weight_(function, op)

    def _replace_decoding_(self, block: Any, op: Any) -> None:
        from coremltools.converters.mil.mil import Builder

        codebook, codes, name = op.x.val, op.indices.val, op.x.name
        bits = next((b for b in _INDEX_BITS if len(codebook) <= 1 << b), None)
        if bits is None:
            self.dense.append(name)
            return
        readers = op.outputs[0].child_ops
        last = readers[0] if len(readers) == 1 and readers[0].op_type == "reshape" else op
        shape = last.outputs[0].shape
        is_direct = shape[:2] == (len(codes), codes.shape[1] * codebook.shape[1]) and set(shape[2:]) <= {1}
        lead = (*codes.shape, *(1 for _ in shape[2:])) if is_direct else codes.shape
        table = numpy.zeros((1 << bits, codebook.shape[1]), numpy.float32)
        table[: len(codebook)] = codebook
        value = Builder.constexpr_lut_to_dense(
            indices=_whole(codes.reshape(lead), bits),
            lut=_table(table.reshape(*(1 for _ in lead), *table.shape), last),
            vector_axis=1,
            before_op=last,
        )
        self.found[name] = value.name
        if not is_direct:
            self.reshaped.append(name)
            value = Builder.reshape(x=value, shape=shape, before_op=last)
        block.replace_uses_of_var_after_op(anchor_op=last, old_var=last.outputs[0], new_var=value, force_replace=True)
        block.remove_ops([last] if last is op else [last, op])


def _is_decoding(op: Any) -> bool:
    """Whether an operator looks up constant codes in a constant codebook."""
    return all(value.val is not None and value.val.ndim == 2 for value in (op.x, op.indices)) and op.axis.val == 0


def _whole(numbers: NDArray[Any], bits: int) -> NDArray[Any]:
    """Numbers in the type that Core ML packs to this number of bits."""
    from coremltools.converters.mil.mil import types

    dtype = numpy.uint8 if bits == 8 else getattr(types, f"np_uint{bits}_dtype")
    return numbers.astype(numpy.uint8).astype(dtype)


def _table(table: NDArray[Any], before: Any) -> Any:
    """The table, as 8-bit integers and a scale if it is on such a grid."""
    from coremltools.converters.mil.mil import Builder

    grid = to_eight_bits(torch.from_numpy(table.reshape(1, -1)))
    if grid is None:
        return table
    return Builder.constexpr_blockwise_shift_scale(
        data=grid[0].numpy().reshape(table.shape),
        scale=grid[1].numpy().reshape([1] * table.ndim),
        before_op=before,
    )


def _replace_weight_(block: Any, op: Any) -> None:
    """Store a dense weight whose rows are on 8-bit grids as integers and a scale per row."""
    from coremltools.converters.mil.mil import Builder

    weight = op.weight.val
    if weight.dtype != numpy.float32 or weight.ndim < 2 or weight.size < _SMALL:
        return
    grid = to_eight_bits(torch.from_numpy(weight.reshape(len(weight), -1)))
    if grid is None:
        return
    value = Builder.constexpr_blockwise_shift_scale(
        data=grid[0].numpy().reshape(weight.shape),
        scale=grid[1].numpy().reshape(-1, *(1 for _ in weight.shape[1:])),
        before_op=op,
    )
    block.replace_uses_of_var_after_op(anchor_op=value.op, old_var=op.weight, new_var=value, force_replace=True)
