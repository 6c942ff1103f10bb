"""Compiled sweeps, against the plain way from block to block."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bgd_plugin import kernels
from bgd_plugin.jit import sweep as module
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.jit.sweep import can_sweep
from bgd_plugin.pq import feedback, least_squares
from bgd_plugin.pq.feedback import encode_with_feedback
from bgd_plugin.pq.least_squares import output_objective, refine_codes

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs llvmlite")
SHAPES = [
    # groups, rows of a group, blocks of a row, block size, codewords
    (1, 9, 40, 4, 256),
    (1, 1, 1, 2, 1),
    (1, 130, 300, 1, 33),
    (1, 5, 20, 9, 17),
    (1, 6, 3, 16, 40),
    (3, 7, 70, 3, 50),
    (20, 2, 3, 4, 16),
    (1, 8, 33, 8, 300),
]


def _layer(groups: int, rows: int, blocks: int, block_size: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, codebook and Gram of correlated inputs."""
    draw = torch.Generator().manual_seed(rows + 7 * blocks)
    columns = blocks * block_size
    mixing = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(groups, 2 * columns + 20, columns, generator=draw) @ mixing
    weight = torch.randn(groups * rows, columns, generator=draw) + 0.3
    codebook = torch.randn(size, block_size, generator=draw) + 0.3
    gram = inputs.mT @ inputs / inputs.shape[1]
    gram.diagonal(dim1=1, dim2=2).add_(0.05)
    return weight, codebook, gram


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_carried_over_as_in_double_precision(shape: tuple[int, ...]) -> None:
    weight, codebook, gram = _layer(*shape)
    found = encode_with_feedback(weight, codebook, gram, damping=0.01)
    plain = encode_with_feedback(weight.double(), codebook.double(), gram.double(), damping=0.01)
    assert found.shape == plain.shape
    assert (found == plain).float().mean() > 0.97  # where two codewords are as near, all that follows may differ
    loss, wanted = (output_objective(weight.double(), codebook.double(), c, gram.double()) for c in (found, plain))
    assert loss <= 1.02 * wanted + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_refined_as_in_double_precision(shape: tuple[int, ...]) -> None:
    weight, codebook, gram = _layer(*shape)
    codes = torch.randint(len(codebook), (len(weight), shape[2]), generator=torch.Generator().manual_seed(0))
    found, changed = refine_codes(weight, codebook, codes, gram)
    plain, _ = refine_codes(weight.double(), codebook.double(), codes, gram.double())
    assert (found == plain).float().mean() > 0.97
    assert changed == int((found != codes).sum())
    before, loss, wanted = (
        output_objective(weight.double(), codebook.double(), c, gram.double()) for c in (codes, found, plain)
    )
    assert loss <= min(before, 1.02 * wanted) + 1e-9


def test_no_choice_raises_the_loss() -> None:
    weight, codebook, gram = _layer(1, 30, 40, 4, 64)
    codes = encode_with_feedback(weight, codebook, gram, damping=0.01)
    losses = [output_objective(weight, codebook, codes, gram)]
    for _ in range(6):
        codes, changed = refine_codes(weight, codebook, codes, gram)
        losses.append(output_objective(weight, codebook, codes, gram))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert changed < codes.numel() / 50


def test_codes_whose_loss_cannot_be_told_stay() -> None:
    weight, codebook, gram = _layer(1, 6, 10, 4, 20)
    codes = torch.randint(1, 20, (6, 10), generator=torch.Generator().manual_seed(0))
    slope = (weight - codebook[codes].flatten(1))[None] @ gram
    slope[0, 2] = torch.nan
    found, _ = refine_codes(weight, codebook, codes, gram, slope=slope)
    assert [torch.equal(x, y) for x, y in zip(found, codes, strict=True)] == [row == 2 for row in range(6)]


def test_what_is_given_stays_as_it_is() -> None:
    weight, codebook, gram = _layer(2, 6, 30, 4, 32)
    codes = torch.zeros(12, 30, dtype=torch.int64)
    given = [x.clone() for x in (weight, codebook, gram, codes)]
    refine_codes(weight, codebook, codes, gram)
    encode_with_feedback(weight, codebook, gram, damping=0.01)
    assert all(torch.equal(x, y) for x, y in zip((weight, codebook, gram, codes), given, strict=True))


def test_several_threads_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codebook, gram = _layer(1, 301, 20, 4, 64)
    alone = encode_with_feedback(weight, codebook, gram, damping=0.01)
    better, _ = refine_codes(weight, codebook, alone, gram)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr("bgd_plugin.jit.threads._CODES_PER_THREAD", 100)
    assert torch.equal(encode_with_feedback(weight, codebook, gram, damping=0.01), alone)
    assert torch.equal(refine_codes(weight, codebook, alone, gram)[0], better)


def test_values_without_a_number_end_and_codes_are_codes() -> None:
    weight, codebook, gram = _layer(1, 6, 10, 4, 20)
    weight[2, 5] = torch.nan
    codes = encode_with_feedback(weight, codebook, gram, damping=0.01)
    refined, _ = refine_codes(weight, codebook, codes, gram)
    clean = torch.arange(6) != 2
    assert ((codes >= 0) & (codes < 20) & (refined >= 0) & (refined < 20)).all()
    wanted = encode_with_feedback(torch.where(weight.isnan(), 0, weight), codebook, gram, damping=0.01)
    assert torch.equal(codes[clean], wanted[clean])


def test_another_default_device_is_no_trouble() -> None:
    weight, codebook, gram = _layer(1, 6, 10, 4, 20)
    codes = encode_with_feedback(weight, codebook, gram, damping=0.01)
    with torch.device("meta"):
        assert torch.equal(encode_with_feedback(weight, codebook, gram, damping=0.01), codes)
        refine_codes(weight, codebook, codes, gram)


def test_what_it_takes() -> None:
    values, codebook = torch.zeros(1, 3, 8), torch.zeros(5, 4)
    assert can_sweep(values, codebook)
    assert not can_sweep(values.double(), codebook)
    assert not can_sweep(values, torch.zeros(5, 32))
    assert not can_sweep(values, torch.zeros(2000, 1))
    assert not can_sweep(values[:, :0], codebook)
    with kernels.disabled():
        assert not can_sweep(values, codebook)


def test_the_sweeps_use_it_unless_there_is_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(feedback, "encode_", lambda *given: calls.append("encode") or module.encode_(*given))
    monkeypatch.setattr(least_squares, "refine_", lambda *given: calls.append("refine") or module.refine_(*given))
    weight, codebook, gram = _layer(1, 6, 40, 4, 20)
    codes = feedback.encode_damped(weight, codebook, gram)
    refine_codes(weight, codebook, codes, gram)
    assert calls == ["encode"] * 2 + ["refine"] * 2  # panels of 128 columns
    mask = torch.ones_like(weight, dtype=torch.bool)
    same = feedback.encode_damped(weight, codebook, gram, mask)
    refine_codes(weight, codebook, codes, gram, mask)
    assert len(calls) == 4
    assert (same == codes).float().mean() > 0.97
