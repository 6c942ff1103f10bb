"""The compiled search for trellis windows gives the codes of the plain one."""

from __future__ import annotations

import pytest
import torch

from bgd_plugin import kernels
from bgd_plugin.fitting.trellis_windows import fit_windows
from bgd_plugin.jit import llvm
from bgd_plugin.kernels import viterbi
from bgd_plugin.pq.viterbi import cheapest_walk, nearest_ring
from tests.pq.test_viterbi import TABLE, _values


@pytest.mark.skipif(not llvm.AVAILABLE, reason="needs llvmlite")
@pytest.mark.parametrize("count", [16, 24, 61])
@pytest.mark.parametrize("seam", [None, 5, 1000])
def test_the_compiled_search_finds_the_same_walks(count: int, seam: int | None) -> None:
    values, weights = _values(count, seed=count)
    weights[::7] = 0  # ties
    search = viterbi.walk_search()
    assert search is not cheapest_walk
    assert (search(values, weights, TABLE, seam) == cheapest_walk(values, weights, TABLE, seam)).all()


def test_the_plain_search_is_used_where_kernels_are_off() -> None:
    with kernels.disabled():
        assert viterbi.walk_search() is cheapest_walk


@pytest.mark.skipif(not llvm.AVAILABLE, reason="needs llvmlite")
def test_rings_and_fits_are_the_same_to_the_bit() -> None:
    values, weights = _values(100)
    one = nearest_ring(viterbi.walk_search(), values, weights, TABLE)
    assert (one == nearest_ring(cheapest_walk, values, weights, TABLE)).all()
    weight = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    compiled = fit_windows(weight, None)
    with kernels.disabled():
        plain = fit_windows(weight, None)
    assert torch.equal(compiled.codes, plain.codes)
    assert torch.equal(compiled.codebook, plain.codebook)
