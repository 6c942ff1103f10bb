"""Compilation of the kernels by LLVM, for this processor, in some milliseconds; no compiler needs to be installed.

The kernels are written in LLVM's intermediate representation through `llvmlite`, an optional package. This module has
what they share: loops, blocks as vectors, reading codes, and compiling a module to a function that ctypes can call. A
call through ctypes releases Python's global lock, so threads can work on rows in parallel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType, TracebackType
from typing import Any

__all__ = [
    "AVAILABLE",
    "Loop",
    "compiled",
    "converts_halves",
    "define",
    "pieces",
    "read_codes",
    "rows_together",
    "vector_lanes",
    "vector_registers",
]

_LANES = 16
"""Floats in the widest vector; LLVM splits it if the processor's vectors are narrower."""
_WORD = 64
_NOTHING: Mapping[str, int] = MappingProxyType({})

AVAILABLE = sys.byteorder == "little" and importlib.util.find_spec("llvmlite") is not None
"""Whether kernels can be compiled here: `llvmlite` is installed, and the machine is little-endian."""


def pieces(size: int) -> list[tuple[int, int]]:
    """Split a block of this size into vectors of 16, 8, 4, 2 and 1 lanes, the widest first: (offset, lanes)."""
    found, offset, lanes = [], 0, _LANES
    while offset < size:
        while lanes > size - offset:
            lanes //= 2
        found.append((offset, lanes))
        offset += lanes
    return found


def define(name: str, pointers: Sequence[str], numbers: Sequence[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Begin a function that takes addresses, then 64-bit integers, and returns nothing.

    Args:
        name: of the function.
        pointers: names of the addresses; their memory must not overlap.
        numbers: names of the 64-bit integers.

    Returns:
        its module, a builder at its start, and its arguments by name.
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
    """`for index in range(start, stop, step)` in generated code, with values carried from one iteration to the next.

    Inside the `with` block, `index` and `values` are those of the current iteration, and `carry` sets the values of the
    next one. After the block, `values` are those of the last iteration.
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
        """Set the values of the next iteration."""
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


def rows_together(builder: Any, first: Any, last: Any, together: int) -> Iterator[list[Any]]:
    """Generated loops over the rows from `first` to `last`: over so many `together`, then one by one over the rest.

    The body of a `for` statement over this emits the code of both loops; it gets the rows' indices.

    Args:
        builder: at the place of the loops.
        first, last: 64-bit integers.
        together: number of rows, a power of two.
    """
    whole = first.type
    many = builder.add(first, builder.and_(builder.sub(last, first), whole(-together)))
    for start, stop, step in ((first, many, together), (many, last, 1)):
        with Loop(builder, start, stop, step) as loop:
            yield [builder.add(loop.index, whole(i)) for i in range(step)]


def read_codes(builder: Any, codes: Any, first: Any, count: int, bits: int) -> list[Any]:
    """`count` codes of `bits` bits, beginning at index `first`, as 64-bit integers; read in words of up to 64 bits.

    Args:
        builder: at the place where the codes are read.
        codes: address of the codes, none of them negative.
        first: index of the first code, a 64-bit integer.
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
    """Number of the processor's vector registers: 32, or 16 on x86 without AVX-512."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    is_x86 = binding.get_process_triple().startswith(("x86", "i386", "i686"))
    return 16 if is_x86 and not features.get("avx512f") else 32


@cache
def vector_lanes() -> int:
    """Floats in one of the processor's vector registers: 16, 8 or 4."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


@cache
def converts_halves() -> bool:
    """Whether the processor converts half precision to single precision itself."""
    from llvmlite import binding

    features, triple = binding.get_host_cpu_features(), binding.get_process_triple()
    return bool(features.get("f16c") or features.get("avx512f")) or triple.startswith(("aarch64", "arm64"))


@cache
def _target() -> Any:
    """Code generation for this processor."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(binding.get_process_triple())
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


def compiled(module: Any, outside: Mapping[str, int] = _NOTHING) -> Any:
    """Compile a module; returns its first function, which takes integers (addresses first) and is never freed.

    Args:
        module: of one function, and of declarations of others.
        outside: addresses of the functions that it only declares.

    Returns:
        the function for ctypes; its attribute `address` is where it is.
    """
    from llvmlite import binding

    target = _target()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    engine = binding.create_mcjit_compiler(parsed, target)
    for name, address in outside.items():
        engine.add_global_mapping(parsed.get_function(name), address)
    engine.finalize_object()
    arguments = len(module.functions[0].args)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
    address = engine.get_function_address(module.functions[0].name)
    function: Any = prototype(address)
    function.address = address
    _kept.append(engine)
    return function


_kept: list[Any] = []
"""The owners of the compiled code."""
