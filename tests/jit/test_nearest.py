"""The compiled search for the nearest codeword, against distances computed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgd_plugin import kernels
from bgd_plugin.jit import nearest as module
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.jit.nearest import LARGEST_BLOCK, can_search, search
from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.feedback import nearest
from bgd_plugin.pq.kmeans import kmeans

compiled = pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _distances(points: Tensor, codebooks: Tensor) -> Tensor:
    """`[groups, n, codebook_size]`, squared, from differences in double precision."""
    return (points.double().unsqueeze(2) - codebooks.double().unsqueeze(1)).square().sum(3)


@compiled
@pytest.mark.parametrize("block_size", [2, 3, 4, 9, 16, LARGEST_BLOCK])
@pytest.mark.parametrize(("groups", "count", "size"), [(1, 1, 1), (1, 7, 5), (3, 33, 16), (2, 100, 257)])
def test_no_codeword_is_nearer(groups: int, count: int, size: int, block_size: int) -> None:
    points, codebooks = _drawn(groups, count, block_size), _drawn(groups, size, block_size, seed=1)
    codes = search(points, codebooks)
    distances = _distances(points, codebooks)
    chosen = distances.gather(2, codes.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, distances.amin(2), rtol=1e-5, atol=1e-5)
    assert codes.shape == (groups, count)


@compiled
def test_of_equal_codewords_the_first_is_taken() -> None:
    codebook = _drawn(5, 4)[torch.tensor([3, 0, 1, 0, 2] * 8)][None]
    points = codebook[:, :5].clone()
    assert search(points, codebook).tolist() == [[0, 1, 2, 1, 4]]


@compiled
def test_points_that_are_not_contiguous_and_points_without_a_number() -> None:
    codebook = _drawn(20, 4)
    wide = _drawn(50, 8, seed=1)
    assert torch.equal(search(wide[None, :, ::2], codebook[None]), search(wide[:, ::2].clone()[None], codebook[None]))
    lost = search(torch.full((1, 3, 4), torch.nan), codebook[None])
    assert ((lost >= 0) & (lost < 20)).all()


@compiled
def test_several_threads_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points, codebooks = _drawn(2, 4001, 4), _drawn(2, 256, 4, seed=1)
    alone = search(points, codebooks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr("bgd_plugin.jit.threads._CODES_PER_THREAD", 1000)
    assert torch.equal(search(points, codebooks), alone)


def test_what_it_takes() -> None:
    assert can_search(_drawn(3, 4)) == AVAILABLE
    assert not can_search(_drawn(3, 4).double())
    assert not can_search(_drawn(3, 1))
    assert not can_search(_drawn(3, LARGEST_BLOCK + 1))
    with kernels.disabled():
        assert not can_search(_drawn(3, 4))


@compiled
def test_the_fits_use_it_and_agree_with_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("bgd_plugin.pq.feedback.search", lambda *given: calls.append(1) or module.search(*given))
    monkeypatch.setattr("bgd_plugin.pq.kmeans.search", lambda *given: calls.append(2) or module.search(*given))
    points, metric, codebook = _drawn(2, 300, 4), _drawn(2, 4, 4, seed=1), _drawn(32, 4, seed=2)
    found = nearest(points, metric, codebook)
    again = kmeans(points[0], codebook, 3, generator=torch.Generator(), compiled=True).codes
    assert calls == [1, 2, 2, 2]
    with kernels.disabled():
        assert torch.equal(nearest(points, metric, codebook), found)
        assert torch.equal(kmeans(points[0], codebook, 3, generator=torch.Generator(), compiled=True).codes, again)
    assert calls == [1, 2, 2, 2]


def test_the_papers_fit_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are the same with and without the extra."""

    def refused(*_: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("bgd_plugin.pq.kmeans.search", refused)
    fit_em(_drawn(50, 4, 4), torch.eye(4), 16, 5, generator=torch.Generator())
