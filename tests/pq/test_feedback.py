"""Error feedback against a version that solves every conditional problem anew, without any factorization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bgd_plugin.pq.feedback import cholesky, damped, encode_with_feedback, factors, nearest
from bgd_plugin.pq.least_squares import output_objective


def layer(groups: int, rows: int, columns: int, seed: int = 0, positions: int = 200) -> tuple[Tensor, Tensor]:
    """A weight `[groups · rows, columns]` and the Gram `[groups, columns, columns]` of correlated inputs; float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    inputs = (torch.randn(groups, positions, columns, generator=generator, dtype=torch.float64) @ mixing).relu()
    weight = torch.randn(groups * rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.mT @ inputs / positions


def random_codebook(size: int, block_size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, block_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_feedback(weight: Tensor, codebook: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Row by row and block by block: try every codeword with the later blocks set to their very best answer to it.

    The loss e H eᵀ of a row with the earlier errors given and the later ones free is minimized by lstsq for each
    codeword; the codeword with the least loss is taken, and its error stands from then on. `[rows, blocks_per_row]`.
    """
    hessian = damped(gram, damping)
    per_group, block_size = weight.shape[0] // gram.shape[0], codebook.shape[1]
    codes = torch.zeros(weight.shape[0], weight.shape[1] // block_size, dtype=torch.int64)
    for row in range(weight.shape[0]):
        root = torch.linalg.cholesky(hessian[row // per_group]).T  # e H eᵀ = ‖root e‖²
        errors = torch.zeros(weight.shape[1], dtype=torch.float64)
        for block in range(codes.shape[1]):
            start, stop = block * block_size, (block + 1) * block_size
            losses = []
            for word in codebook:
                errors[start:stop] = weight[row, start:stop] - word
                fixed = root[:, :stop] @ errors[:stop]
                if stop < weight.shape[1]:
                    answer = torch.linalg.lstsq(root[:, stop:], -fixed.unsqueeze(1), driver="gelsd").solution
                    fixed = fixed + (root[:, stop:] @ answer).squeeze(1)
                losses.append(float(fixed.square().sum()))
            codes[row, block] = min(range(len(losses)), key=losses.__getitem__)
            errors[start:stop] = weight[row, start:stop] - codebook[codes[row, block]]
    return codes


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_it_is_the_literal_version(groups: int, block_size: int) -> None:
    weight, gram = layer(groups, 5, 12)
    codebook = random_codebook(16, block_size)
    found = encode_with_feedback(weight, codebook, gram, damping=0.01)
    assert torch.equal(found, literal_feedback(weight, codebook, gram, 0.01))


def test_fewer_inputs_than_columns() -> None:
    weight, gram = layer(1, 6, 24, positions=7)
    codebook = random_codebook(16, 4)
    found = encode_with_feedback(weight, codebook, gram, damping=1.0)
    assert torch.equal(found, literal_feedback(weight, codebook, gram, 1.0))


def test_it_loses_less_than_the_nearest_codewords() -> None:
    weight, gram = layer(1, 64, 48)
    codebook = random_codebook(64, 4)
    plain = nearest(weight.reshape(1, -1, 4), torch.eye(4, dtype=torch.float64)[None], codebook).reshape(64, 12)
    fed = encode_with_feedback(weight, codebook, gram, damping=0.01)
    before = output_objective(weight, codebook, plain, gram)
    assert output_objective(weight, codebook, fed, gram) < 0.7 * before


def test_a_diagonal_gram_leaves_nothing_to_answer() -> None:
    weight, _ = layer(1, 20, 12)
    codebook = random_codebook(16, 4)
    found = encode_with_feedback(weight, codebook, torch.eye(12, dtype=torch.float64)[None], damping=0.1)
    distances = torch.cdist(weight.reshape(-1, 4), codebook)
    assert torch.equal(found.flatten(), distances.argmin(1))


def test_a_matrix_is_one_group_and_single_precision_agrees() -> None:
    weight, gram = layer(1, 40, 32)
    codebook = random_codebook(32, 4)
    exact = encode_with_feedback(weight, codebook, gram[0], damping=0.01)
    single = encode_with_feedback(weight.float(), codebook.float(), gram[0], damping=0.01)
    assert (exact == single).double().mean() > 0.99


def test_all_zero_inputs_mean_plain_nearest() -> None:
    weight, gram = layer(2, 8, 8)
    codebook = random_codebook(8, 4)
    found = encode_with_feedback(weight, codebook, torch.zeros_like(gram), damping=0.01)
    assert torch.equal(found.flatten(), torch.cdist(weight.reshape(-1, 4), codebook).argmin(1))


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 700),
    blocks=st.integers(1, 3),
    block_size=st.integers(1, 5),
    size=st.integers(1, 600),
)
def test_shapes_and_nearest_in_pieces(groups: int, rows: int, blocks: int, block_size: int, size: int) -> None:
    weight, gram = layer(groups, rows, blocks * block_size, positions=30)
    codebook = random_codebook(size, block_size)
    codes = encode_with_feedback(weight, codebook, gram, damping=0.1)
    assert codes.shape == (groups * rows, blocks)
    assert 0 <= int(codes.min()) <= int(codes.max()) < size
    points = weight.reshape(groups, rows * blocks, block_size)
    metric = gram[:, :block_size, :block_size]
    chosen = nearest(points, metric, codebook)
    losses = torch.cdist(points @ metric, codebook @ metric, compute_mode="donot_use_mm_for_euclid_dist")
    picked = losses.gather(2, chosen.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(picked, losses.min(2).values, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    weight, gram = layer(2, 4, 12)
    with pytest.raises(ValueError, match="12 weights per row do not divide into blocks of 5"):
        encode_with_feedback(weight, random_codebook(4, 5), gram, damping=0.1)
    with pytest.raises(ValueError, match="does not suit a weight"):
        encode_with_feedback(weight[:3], random_codebook(4, 4), gram, damping=0.1)
    with pytest.raises(ValueError, match="damping above 0"):
        encode_with_feedback(weight, random_codebook(4, 4), gram, damping=0.0)


def test_damping_is_the_mean_but_for_columns_that_are_next_to_always_zero() -> None:
    gram = torch.diag(torch.tensor([1.0, 3.0, 0.001, 0.0], dtype=torch.float64))[None]
    added = (damped(gram, 0.1) - gram)[0].diagonal()
    mean = float(gram.diagonal(dim1=1, dim2=2).mean())
    expected = [0.1 * (part + 1e-4 * mean) for part in (mean, mean, 100 * 0.001, 0.0)]
    assert added.tolist() == pytest.approx(expected)


def test_weights_that_meet_only_zeros_leave_the_others_their_codewords() -> None:
    """A 3×3 kernel on a single pixel: only its centre counts, and 16 codewords hit 16 different centres exactly."""
    weight = random_codebook(16, 9, seed=2)
    gram = torch.zeros(9, 9, dtype=torch.float64)
    gram[4, 4] = 1.0
    codebook = random_codebook(16, 9)
    codebook[:, 4] = weight[:, 4]
    codes = encode_with_feedback(weight, codebook, gram, damping=1.0)
    assert torch.equal(codebook[codes.flatten(), 4], weight[:, 4])


def test_a_factor_that_single_precision_cannot_have_is_computed_in_double() -> None:
    kinds = set()
    for seed in range(20):
        x = torch.randn(12, 24, generator=torch.Generator().manual_seed(seed))
        for gram in (x.T @ x + 1.2e-6 * torch.eye(24), x.T @ x + torch.eye(24)):
            if int(torch.linalg.cholesky_ex(gram.double()).info) == 0:
                root = cholesky(gram)
                torch.testing.assert_close((root @ root.mT).float(), gram, rtol=1e-5, atol=1e-5)
                assert (root.dtype == torch.float64) == (int(torch.linalg.cholesky_ex(gram).info) > 0)
                kinds.add(root.dtype)
    assert kinds == {torch.float32, torch.float64}
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        cholesky(-torch.eye(3))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-12, 1.0, 1e9]), st.sampled_from([1, 3, 4]))
def test_factors_in_single_precision_are_those_in_double(seed: int, unit: float, block_size: int) -> None:
    """Of damped Grams with columns of all sizes, as they come from few inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 20, 36, generator=generator).relu() * torch.logspace(-6, 0, 36) * unit**0.5
    exact = damped((x.mT @ x).double(), 0.2)
    metrics, inverse = factors(exact.float(), block_size)
    wanted_metrics, wanted_inverse = factors(exact, block_size)
    scale = exact.diagonal(dim1=1, dim2=2).sqrt().float()
    assert metrics.dtype == torch.float32
    inverses = [part.float() * scale.unsqueeze(2) for part in (inverse, wanted_inverse)]
    torch.testing.assert_close(*inverses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(metrics, wanted_metrics.float(), rtol=1e-4, atol=1e-4 * float(scale.max()))
