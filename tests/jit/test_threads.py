"""Kernels called by several threads at once, and by a forked process."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bgd_plugin.jit.threads import share_rows
from bgd_plugin.kernels.linear import WAYS
from bgd_plugin.kernels.permuted import can_permute
from tests.kernels.test_linear import assert_close, layer, plain


def test_every_row_is_worked_on_once(two_threads: None) -> None:
    for rows, blocks in ((1, 1 << 20), (3, 1 << 18), (1000, 1000), (7, 3), (0, 8)):
        seen = torch.zeros(rows, dtype=torch.int64)

        def work(first: int, last: int, seen: torch.Tensor = seen) -> None:
            seen[first:last] += 1

        share_rows(rows, blocks, work)
        assert bool((seen == 1).all())


def test_an_error_in_a_share_is_raised(two_threads: None) -> None:
    def work(first: int, last: int) -> None:
        if first:
            raise ValueError("the second share")

    with pytest.raises(ValueError, match="second share"):
        share_rows(1000, 1000, work)


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
