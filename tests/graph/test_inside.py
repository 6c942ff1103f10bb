"""Layers of a network that is no graph: which weights are shared, and with whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.graph.inside import find_inside


class Scaled(nn.Embedding):
    """An embedding that overrides its forward, and whose weight is looked up as well."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


def replaced() -> nn.Embedding:
    """An embedding whose instance has another forward, of which nothing is known."""
    embedding = nn.Embedding(64, 16)
    embedding.forward = lambda input: nn.functional.embedding(input, embedding.weight) * 3  # type: ignore[method-assign]
    return embedding


class Language(nn.Module):
    """An embedding, a layer, and a head that is tied to the embedding; the forward cannot be traced."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding: Any = embedding
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embedding(ids))
        if float(hidden.sum()) > 1e9:
            hidden = -hidden
        return self.head(hidden)


EMBEDDINGS: dict[str, Callable[[], nn.Module]] = {
    "replaced": replaced,
    "max_norm": lambda: nn.Embedding(64, 16, max_norm=1.0),
    "bag": lambda: nn.EmbeddingBag(64, 16),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_head_tied_to_an_embedding_that_stays_is_left_with_the_reason(name: str) -> None:
    found, left = find_inside(Language(EMBEDDINGS[name]()))
    assert [layer.name for layer in found] == ["body"]
    assert any(layer.name == "head" and "also used by 'embedding'" in layer.reason for layer in left)


def test_a_tie_with_a_scaled_embedding_survives() -> None:
    torch.manual_seed(0)
    model = Language(Scaled(64, 16)).eval()
    batches = [torch.randint(0, 64, (4, 6)) for _ in range(3)]
    config = bgd.BGDConfig(embedding=bgd.LayerConfig(block_size=4, codebook_size=16), max_divergence=None)
    result: Any = bgd.quantize(model, batches, config, progress=False).model
    assert result.head.codes is result.embedding.codes
    assert result.head.codebook is result.embedding.codebook
