"""How the kernels become machine code: LLVM compiles them for this processor in some milliseconds, with no compiler.

The kernels are written in LLVM's intermediate representation through `llvmlite`, an optional package. What they share
is here: loops, vectors in pieces, reading codes, and turning a module into a function that ctypes can call. A call
through ctypes releases Python's global lock, so that rows can be shared among threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import Any

__all__ = ["AVAILABLE", "Loop", "compiled", "define", "pieces", "read_codes", "vector_registers"]

_LANES = 16
"""Floats in the widest vector; LLVM splits it where the processor's are narrower."""
_WORD = 64

AVAILABLE = sys.byteorder == "little" and importlib.util.find_spec("llvmlite") is not None
"""Whether kernels can be compiled here: `llvmlite` is installed, and the machine is little-endian."""


def pieces(size: int) -> list[tuple[int, int]]:
    """A block as vectors of 16, 8, 4, 2 and 1 lanes, the widest first: (offset, lanes)."""
    found, offset, lanes = [], 0, _LANES
    while offset < size:
        while lanes > size - offset:
            lanes //= 2
        found.append((offset, lanes))
        offset += lanes
    return found


def define(name: str, pointers: Sequence[str], numbers: Sequence[str]) -> tuple[Any, Any, dict[str, Any]]:
    """A function that takes addresses, then 64-bit integers, and returns nothing.

    Returns:
        Its module, a builder at its start, and its arguments by name. The addresses overlap nowhere.
    """
    from llvmlite import ir

    module = ir.Module(name)
    kinds = [ir.PointerType()] * len(pointers) + [ir.IntType(64)] * len(numbers)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    for argument in function.args[: len(pointers)]:
        argument.add_attribute("noalias")
    arguments = dict(zip([*pointers, *numbers], function.args, strict=True))
    return module, ir.IRBuilder(function.append_basic_block("entry")), arguments


class Loop:
    """`for index in range(start, stop, step)` in generated code, with values that each turn hands to the next.

    Inside the `with` block, `index` and `values` are those of this turn, and `carry` names those of the next. After it
    `values` are those that the last turn left.
    """

    def __init__(self, builder: Any, start: Any, stop: Any, step: int = 1, values: Sequence[Any] = ()) -> None:
        self.builder = builder
        self._start, self._stop, self._step, self._first = start, stop, step, list(values)
        self._next: list[Any] = []

    def __enter__(self) -> Loop:
        builder = self.builder
        before = builder.block
        self._head = builder.append_basic_block("head")
        body, self._end = builder.append_basic_block("body"), builder.append_basic_block("end")
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.index = builder.phi(self._start.type)
        self.index.add_incoming(self._start, before)
        self.values = [builder.phi(value.type) for value in self._first]
        for phi, value in zip(self.values, self._first, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", self.index, self._stop), body, self._end)
        builder.position_at_end(body)
        return self

    def carry(self, values: Sequence[Any]) -> None:
        """The values of the next turn."""
        self._next = list(values)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            return
        builder = self.builder
        last = builder.block
        self.index.add_incoming(builder.add(self.index, self.index.type(self._step)), last)
        for phi, value in zip(self.values, self._next, strict=True):
            phi.add_incoming(value, last)
        builder.branch(self._head)
        builder.position_at_end(self._end)


def read_codes(builder: Any, codes: Any, first: Any, count: int, bits: int) -> list[Any]:
    """`count` codes of `bits` bits from number `first` on, as 64-bit integers; read in words of up to 64 bits.

    Args:
        builder: at the place where the codes are read.
        codes: address of the codes, none of them negative.
        first: number of the first, a 64-bit integer.
        count: 1, 2, 4 or 8.
        bits: 8, 16 or 32.
    """
    from llvmlite import ir

    whole, per_word = ir.IntType(64), max(1, min(_WORD, count * bits) // bits)
    found = []
    for start in range(0, count, per_word):
        place = builder.gep(codes, [builder.add(first, whole(start))], source_etype=ir.IntType(bits))
        word = builder.load(place, typ=ir.IntType(per_word * bits), align=1)
        for i in range(per_word):
            code = builder.lshr(word, word.type(i * bits)) if i else word
            code = builder.trunc(code, ir.IntType(bits)) if per_word > 1 else code
            found.append(builder.zext(code, whole))
    return found


@cache
def vector_registers() -> int:
    """How many vectors the processor holds: 32, but for x86 without AVX-512."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    is_x86 = binding.get_process_triple().startswith(("x86", "i386", "i686"))
    return 16 if is_x86 and not features.get("avx512f") else 32


@cache
def _target() -> Any:
    """Code generation for the processor that this runs on."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(binding.get_process_triple())
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


def compiled(module: Any) -> Any:
    """The module's one function, callable with integers: addresses first. It is kept for the life of the process."""
    from llvmlite import binding

    target = _target()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    engine = binding.create_mcjit_compiler(parsed, target)
    engine.finalize_object()
    arguments = len(module.functions[0].args)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
    function = prototype(engine.get_function_address(module.functions[0].name))
    _kept.append(engine)
    return function


_kept: list[Any] = []
"""The owners of the compiled code."""
