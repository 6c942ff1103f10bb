"""The product-quantized embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin.nn.base import PQModule

__all__ = ["PQEmbedding"]


class PQEmbedding(PQModule):
    """`nn.Embedding` with a decoded weight; only the requested rows are decoded."""

    def __init__(self, codebook: Tensor, codes: Tensor, like: nn.Embedding) -> None:
        PQModule.__init__(self, codebook, codes, like.weight.shape)
        self.num_embeddings = like.num_embeddings
        self.embedding_dim = like.embedding_dim
        self.padding_idx = like.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map an input of indices `[...]` to `[..., embedding_dim]`."""
        if self.mask is not None:
            return functional.embedding(input, self.weight, self.padding_idx)
        return self.form.rows(self.codebook, self.codes, input)

    def to_float(self) -> nn.Embedding:
        """The float module of the same size, on the meta device."""
        return nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")

    def extra_repr(self) -> str:
        """Number and size of rows, block size and codebook size, for `print`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.pq_repr()}"
