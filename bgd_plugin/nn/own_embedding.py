"""The product-quantized form of an embedding whose class has a `forward` of its own, such as one that scales its rows.

Its code stays what it is: wherever it calls `super().forward(input)`, the rows are decoded, and wherever it reads
`self.weight`, the whole table is.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from bgd_plugin.nn.base import PQModule
from bgd_plugin.nn.embedding import PQEmbedding

__all__ = ["embedding_like"]


class _Rows(PQEmbedding, nn.Embedding):
    """Comes before `nn.Embedding` in the order in which a subclass looks for its parents' methods."""

    weight = PQModule.weight
    _own_class: type[nn.Embedding]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that is made while the program runs is found again by the class that it was made of."""
        return _blank, (self._own_class,), self.__dict__.copy()


@functools.cache
def _form(kind: type[nn.Embedding]) -> type[_Rows]:
    return type(f"PQ{kind.__name__}", (kind, _Rows), {"__module__": __name__, "_own_class": kind})


def _blank(kind: type[nn.Embedding]) -> _Rows:
    form = _form(kind)  # type: ignore[arg-type]
    return form.__new__(form)


def embedding_like(codebook: Tensor, codes: Tensor, like: nn.Embedding) -> PQEmbedding:
    """A quantized embedding; one that runs the `forward` of `like`'s class on decoded rows, if it has its own.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`.
        like: an embedding, or of a subclass.
    """
    if type(like).forward is nn.Embedding.forward:
        return PQEmbedding(codebook, codes, like)
    module = _blank(type(like))
    PQEmbedding.__init__(module, codebook, codes, like)
    return module
