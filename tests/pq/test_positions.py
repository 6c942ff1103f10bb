"""K-means under each position's own metric: against literal steps, and to the end on a line."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq import line, positions
from bgd_plugin.pq.feedback import diagonal_blocks, nearest
from bgd_plugin.pq.line import settled_on_a_line
from bgd_plugin.pq.positions import position_codebook, positions_as_groups
from tests.pq.test_feedback import layer, random_codebook


def test_positions_with_their_own_metrics() -> None:
    """Against a literal version: each block under its own H, each codeword by the normal equations of its members."""
    weight, gram = layer(2, 30, 12)
    blocks, metrics = positions_as_groups(weight.reshape(2, 30, 12), diagonal_blocks(gram, 4))
    assert torch.equal(blocks[4], weight[30:, 4:8])
    assert torch.equal(metrics[4], gram[1, 4:8, 4:8])
    start = random_codebook(8, 4)
    roots = torch.linalg.cholesky(metrics)
    found, first = position_codebook(blocks, metrics, start, 1), nearest(blocks, roots, start)
    codes = nearest(blocks, roots, found)
    for word in range(8):
        matrix, side = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for position, row in (first == word).nonzero().tolist():
            matrix += metrics[position]
            side += metrics[position] @ blocks[position, row]
        if bool(matrix.any()):
            torch.testing.assert_close(found[word], torch.linalg.solve(matrix, side), rtol=1e-3, atol=1e-4)
    losses = torch.einsum("pnkd,pde,pnke->pnk", blocks[:, :, None] - found, metrics, blocks[:, :, None] - found)
    assert torch.equal(codes, losses.argmin(2))


def _loss(blocks: Tensor, metrics: Tensor, start: Tensor, iterations: int) -> float:
    codebook = position_codebook(blocks, metrics, start, iterations)
    errors = blocks - codebook[nearest(blocks, torch.linalg.cholesky(metrics), codebook)]
    return float(torch.einsum("pnd,pde,pne->", errors, metrics, errors))


def test_more_iterations_lose_less_and_long_steps_come_further(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(1, 200, 32)
    blocks, metrics = positions_as_groups(weight.reshape(1, 200, 32), diagonal_blocks(gram, 4))
    start = random_codebook(40, 4)
    losses = [_loss(blocks, metrics, start, iterations) for iterations in range(7)]
    assert all(after < before for before, after in itertools.pairwise(losses))
    monkeypatch.setattr(positions, "_RELAXATION", 1.0)
    assert losses[6] < _loss(blocks, metrics, start, 6)


def _literal(points: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Lloyd's algorithm, point by point."""
    centroids = start.sort().values.tolist()
    while True:
        members: list[list[tuple[float, float]]] = [[] for _ in centroids]
        for point, weight in zip(points.flatten().tolist(), weights.flatten().tolist(), strict=True):
            nearest = min(range(len(centroids)), key=lambda i: (abs(point - centroids[i]), i))
            members[nearest].append((point, weight))
        moved = [
            sum(p * w for p, w in own) / sum(w for _, w in own) if own else centre
            for own, centre in zip(members, centroids, strict=True)
        ]
        if max(abs(x - y) for x, y in zip(moved, centroids, strict=True)) < 1e-12:
            return torch.tensor(moved, dtype=torch.float64)
        centroids = moved


@pytest.mark.parametrize("seed", range(8))
def test_on_a_line_it_is_lloyds_algorithm_to_the_end(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(6, 30, generator=draw, dtype=torch.float64)
    weights = torch.rand(6, 1, generator=draw, dtype=torch.float64).expand(6, 30)
    start = 3 * torch.randn(9, generator=draw, dtype=torch.float64)  # some have no members
    found = settled_on_a_line(points, weights, start, 100)
    torch.testing.assert_close(found, _literal(points, weights, start))


def test_blocks_of_one_weight_come_to_rest_under_the_weights_of_their_positions() -> None:
    weight, gram = layer(1, 60, 8)
    blocks, metrics = positions_as_groups(weight.reshape(1, 60, 8), diagonal_blocks(gram, 1))
    start = random_codebook(6, 1)
    found = position_codebook(blocks, metrics, start, 20)
    wanted = _literal(blocks.squeeze(2).double(), metrics.reshape(8, 1).double().expand(8, 60), start[:, 0].double())
    torch.testing.assert_close(found[:, 0].double(), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(position_codebook(blocks, metrics, start, 0), start.sort(0).values.to(blocks))


def test_of_very_many_points_some_of_each_row_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(line, "_MOST_POINTS", 4000)
    found = settled_on_a_line(points, torch.ones_like(points), torch.linspace(-2, 2, 5), 20)
    some = settled_on_a_line(points[:, ::3], torch.ones(20, 167), torch.linspace(-2, 2, 5), 20)
    assert torch.equal(found, some)


def test_points_at_the_place_of_a_centroid_and_single_centroids() -> None:
    points = torch.tensor([[0.0, 0.0, 1.0, 1.0, 5.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 3.0, 2.0]])
    assert settled_on_a_line(points, weights, torch.tensor([9.0, 0.0, 1.0]), 9).tolist() == [0.0, 1.0, 5.0]
    assert settled_on_a_line(points, weights, torch.tensor([7.0]), 9).tolist() == [1.75]
