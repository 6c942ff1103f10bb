"""Viterbi's search through trellis windows, compiled: `pq.viterbi.cheapest_walk` at about 50 times its speed.

The same floats are computed by the same operations in the same order, so the walks are the same to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
from numpy.typing import NDArray

from bgd_plugin.jit.llvm import Loop, compiled, define
from bgd_plugin.jit.switch import enabled
from bgd_plugin.pq.viterbi import Floats, Search, cheapest_walk, first_costs, last_state
from bgd_plugin.pq.windows import STATES

__all__ = ["walk_search"]

_BRANCHES = 4
_KEPT = STATES // _BRANCHES
_LANES = 16
_BYTE, _FLOAT_BYTES = 8, 4


def walk_search() -> Search:
    """The fastest search that can be used here: compiled, or in numpy."""
    return _compiled_walk if enabled() else cheapest_walk


def _compiled_walk(values: Floats, weights: Floats, table: Floats, seam: int | None) -> NDArray[numpy.int16]:
    """As `cheapest_walk`."""
    count = len(values)
    given = [numpy.ascontiguousarray(array, numpy.float32) for array in (values, weights, table)]
    costs = numpy.empty((2, STATES), numpy.float32)
    costs[0] = first_costs(seam)
    picks = numpy.empty((count, _KEPT), numpy.uint8)
    addresses = [array.ctypes.data for array in given]
    _forward_program()(*addresses, costs.ctypes.data, picks.ctypes.data, count)
    states = numpy.empty(count, numpy.int16)
    last = last_state(costs[count % 2], seam)
    _backward_program()(picks.ctypes.data, states.ctypes.data, count, last)
    return states


@cache
def _forward_program() -> Any:
    """The costs of all states after each value, and which of four states each was reached from.

    It takes the addresses of values and weights `[count]`, table `[4096]`, costs `[2, 4096]`, which are read and
    written in turn, and picks `[count, 1024]`, then the count.
    """
    from llvmlite import ir

    module, builder, a = define("walk", ("values", "weights", "table", "costs", "picks"), ("count",))
    real, whole, byte = ir.FloatType(), ir.IntType(64), ir.IntType(_BYTE)
    reals = ir.VectorType(real, _LANES)

    def load(address: Any, index: Any) -> Any:
        place = builder.gep(address, [index], source_etype=real)
        return builder.load(place, typ=reals, align=_FLOAT_BYTES)

    def in_all_lanes(address: Any, index: Any) -> Any:
        number = builder.load(builder.gep(address, [index], source_etype=real), typ=real, align=_FLOAT_BYTES)
        first = builder.insert_element(ir.Constant(reals, ir.Undefined), number, ir.IntType(32)(0))
        return builder.shuffle_vector(first, first, _places([0] * _LANES))

    with Loop(builder, whole(0), a["count"], values=[whole(0)]) as step:
        (here,) = step.values
        there = builder.sub(whole(STATES), here)
        value, weight = in_all_lanes(a["values"], step.index), in_all_lanes(a["weights"], step.index)
        row = builder.mul(step.index, whole(_KEPT))
        with Loop(builder, whole(0), whole(_KEPT), _LANES) as kept:
            start = builder.add(here, kept.index)
            best, pick = _cheapest(
                builder, [load(a["costs"], builder.add(start, whole(b * _KEPT))) for b in range(_BRANCHES)]
            )
            place = builder.gep(a["picks"], [builder.add(row, kept.index)], source_etype=byte)
            builder.store(pick, place, align=1)
            first = builder.mul(kept.index, whole(_BRANCHES))
            for part in range(_BRANCHES):
                repeated = _places([(part * _LANES + lane) // _BRANCHES for lane in range(_LANES)])
                at = builder.add(first, whole(part * _LANES))
                away = builder.fsub(value, load(a["table"], at))
                cost = builder.fmul(builder.fmul(away, away), weight)
                cost = builder.fadd(cost, builder.shuffle_vector(best, best, repeated))
                place = builder.gep(a["costs"], [builder.add(there, at)], source_etype=real)
                builder.store(cost, place, align=_FLOAT_BYTES)
        step.carry([there])
    builder.ret_void()
    return compiled(module)


def _cheapest(builder: Any, costs: list[Any]) -> tuple[Any, Any]:
    """The least of some vectors of costs in each lane, and which one it is; the first of equal ones."""
    from llvmlite import ir

    numbers = ir.VectorType(ir.IntType(_BYTE), _LANES)
    best, pick = costs[0], ir.Constant(numbers, [0] * _LANES)
    for branch, other in enumerate(costs[1:], start=1):
        less = builder.fcmp_ordered("<", other, best)
        best = builder.select(less, other, best)
        pick = builder.select(less, ir.Constant(numbers, [branch] * _LANES), pick)
    return best, pick


def _places(lanes: list[int]) -> Any:
    from llvmlite import ir

    return ir.Constant(ir.VectorType(ir.IntType(32), _LANES), lanes)


@cache
def _backward_program() -> Any:
    """The states of a walk, from the last one back: takes picks and states, then their count and the last state."""
    from llvmlite import ir

    module, builder, a = define("back", ("picks", "states"), ("count", "last"))
    whole, short, byte = ir.IntType(64), ir.IntType(16), ir.IntType(_BYTE)
    with Loop(builder, whole(0), a["count"], values=[a["last"]]) as step:
        (state,) = step.values
        at = builder.sub(builder.sub(a["count"], whole(1)), step.index)
        builder.store(builder.trunc(state, short), builder.gep(a["states"], [at], source_etype=short), align=2)
        kept = builder.lshr(state, whole(2))
        place = builder.add(builder.mul(at, whole(_KEPT)), kept)
        pick = builder.load(builder.gep(a["picks"], [place], source_etype=byte), typ=byte, align=1)
        step.carry([builder.add(builder.mul(builder.zext(pick, whole), whole(_KEPT)), kept)])
    builder.ret_void()
    return compiled(module)
