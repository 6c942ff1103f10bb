"""Run calls of compiled functions on the threads of torch's own OpenMP runtime.

Threads of OpenMP spin for some milliseconds after a parallel region, waiting for the next one. Threads of our own would
compete with them for the same cores after every operator of torch's. So calls run in a region of the same runtime, the
library that torch itself is linked to, on the threads that are spinning.

**Source**: the interface of GCC's libgomp, `GOMP_parallel`, which Intel's runtime has, too.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bgd_plugin.jit.llvm import Loop, compiled, define

__all__ = ["BARRIER", "run_calls", "run_team", "runtime"]

BARRIER = "GOMP_barrier"
"""The name of the function that waits for all threads of a region."""
_ASKED = "omp_get_thread_num", "omp_get_num_threads"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """An OpenMP runtime.

    Attributes:
        parallel: `GOMP_parallel(function, data, threads, flags)`, which releases Python's global lock.
        functions: addresses of `omp_get_thread_num`, `omp_get_num_threads` and `BARRIER`, by name.
    """

    parallel: Any
    functions: Mapping[str, int]


@cache
def runtime() -> Runtime | None:
    """The runtime that torch is linked to; None where it has another interface, as on macOS and Windows."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so*")):
        try:
            library = ctypes.CDLL(str(file))  # loaded already; names are looked up in what it is linked to, too
            start, *functions = (getattr(library, name) for name in ("GOMP_parallel", *_ASKED, BARRIER))
        except (OSError, AttributeError):
            continue
        start.argtypes, start.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        addresses = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
        return Runtime(parallel=start, functions=dict(zip((*_ASKED, BARRIER), addresses, strict=True)))
    return None


def run_calls(own: Runtime, program: Any, shares: Sequence[Sequence[tuple[int, ...]]], threads: int) -> None:
    """Call a compiled function, the shares on as many threads; returns when all are done.

    Args:
        own: the runtime.
        program: the function, see `llvm.compiled`.
        shares: for each the arguments of its calls, which are made in turn; of each the same number of calls.
        threads: of the region: all that torch may use, since another number would end some, or start them.
    """
    data = array("q", (len(shares), len(shares[0])))
    for share in shares:
        for call in share:
            data.extend(call)
    own.parallel(_region(program.address, len(program.argtypes)).address, data.buffer_info()[0], threads, 0)


def run_team(own: Runtime, program: Any, data: int, threads: int, last: int) -> None:
    """Call a compiled function once on each thread of a region; it may wait for the others (`BARRIER`).

    Args:
        own: the runtime.
        program: the function; it takes `data`, the thread's number, the number of threads, and `last`.
        data: the address of what the function reads and writes, 64-bit integers.
        threads: of the region.
        last: any number.
    """
    own.parallel(_team(program.address, last).address, data, threads, 0)


@cache
def _team(address: int, last: int) -> Any:
    """What each thread of `run_team` runs, for the function at an address."""
    from llvmlite import ir

    module, builder, a = define("team", ("data",), ())
    own, (thread, threads), whole = _functions(), _asked(module, builder), ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), whole, whole, whole])
    builder.call(ir.Function(module, kind, "program"), [a["data"], thread, threads, whole(last)])
    builder.ret_void()
    return compiled(module, {"program": address, **own})


def _asked(module: Any, builder: Any) -> list[Any]:
    """The number of the thread that runs the code, and of all threads."""
    from llvmlite import ir

    asked = [ir.Function(module, ir.FunctionType(ir.IntType(32), []), name) for name in _ASKED]
    return [builder.sext(builder.call(function, []), ir.IntType(64)) for function in asked]


def _functions() -> dict[str, int]:
    own = runtime()
    assert own is not None
    return {name: own.functions[name] for name in _ASKED}


@cache
def _region(address: int, count: int) -> Any:
    """What each thread runs: its shares of the calls of the function at an address, which takes `count` numbers.

    The function takes the address of 64-bit integers: the number of shares, of calls in each, and all arguments.
    """
    from llvmlite import ir

    module, builder, a = define("region", ("data",), ())
    whole = ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [whole] * count)
    call = ir.Function(module, kind, "program")

    def read(place: Any) -> Any:
        return builder.load(builder.gep(a["data"], [place], source_etype=whole), typ=whole, align=8)

    shares, calls = read(whole(0)), read(whole(1))
    thread, threads = _asked(module, builder)
    bounds = [builder.sdiv(builder.mul(shares, number), threads) for number in (thread, builder.add(thread, whole(1)))]
    with Loop(builder, *bounds) as share, Loop(builder, whole(0), calls) as turn:
        number = builder.add(builder.mul(share.index, calls), turn.index)
        first = builder.add(builder.mul(number, whole(count)), whole(2))
        builder.call(call, [read(builder.add(first, whole(i))) for i in range(count)])
    builder.ret_void()
    return compiled(module, {"program": address, **_functions()})
