"""Kernels called by several threads at once, and by a forked process."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.jit import threads as shared
from bgd_plugin.jit.llvm import AVAILABLE, Loop, compiled, define
from bgd_plugin.jit.openmp import runtime
from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.linear import WAYS
from bgd_plugin.kernels.permuted import can_permute
from tests.kernels.test_linear import assert_close, layer, plain

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")


@cache
def _counting() -> Any:
    """A compiled function that adds to the numbers of rows `first` to `last`: row by row `10 · number + step`."""
    from llvmlite import ir

    module, builder, a = define("count", ("numbers",), ("first", "last", "step"))
    whole = ir.IntType(64)
    with Loop(builder, a["first"], a["last"]) as rows:
        place = builder.gep(a["numbers"], [rows.index], source_etype=whole)
        number = builder.mul(builder.load(place, typ=whole, align=8), whole(10))
        builder.store(builder.add(number, a["step"]), place, align=8)
    builder.ret_void()
    return compiled(module)


def _counted(rows: int, blocks: int) -> Tensor:
    numbers = torch.zeros(rows, dtype=torch.int64)
    place = numbers.data_ptr()
    share_rows(rows, blocks, _counting(), lambda first, last: [(place, first, last, step) for step in (1, 2, 3)])
    return numbers


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("has_runtime", [True, False])
def test_every_row_is_worked_on_once_by_all_calls_in_turn(
    threads: int, has_runtime: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(threads)
    if not has_runtime:
        monkeypatch.setattr(shared, "runtime", lambda: None)
    for rows, blocks in ((1, 1 << 20), (2, 1 << 20), (3, 1 << 18), (1000, 1000), (7, 3), (0, 8)):
        assert _counted(rows, blocks).tolist() == [123] * rows


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another runtime")
def test_the_threads_are_those_of_torch(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread of ours is started: it would compete with torch's for the cores."""
    found = runtime()
    assert found is not None
    monkeypatch.setattr(shared, "_workers", None)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    before = set(os.listdir("/proc/self/task"))
    _counted(1000, 1000)
    assert set(os.listdir("/proc/self/task")) == before


@pytest.mark.parametrize("way", sorted(WAYS))
def test_many_callers_at_once(way: str, two_threads: None) -> None:
    codebook, codes = layer(512, 600, 4, 256)
    if way == "permuted" and not can_permute(codes, codebook):
        pytest.skip("the processor does not look up bytes")
    inputs = [torch.randn(2, 2400) for _ in range(16)]
    expected = [plain(x, codebook, codes, None, None) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: WAYS[way](x, codebook, codes, None), inputs))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own(two_threads: None) -> None:
    """The child inherits compiled code, and none of the threads that the parent has started."""
    codebook, codes = layer(512, 600, 4, 256)
    x = torch.randn(1, 2400)
    before = WAYS["dot"](x, codebook, codes, None)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        os._exit(0 if torch.equal(WAYS["dot"](x, codebook, codes, None), before) else 1)
    assert os.waitpid(child, 0)[1] == 0
