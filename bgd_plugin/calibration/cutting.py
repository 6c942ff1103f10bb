"""Some samples of a batch: a batch is cut along the first dimension of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch, Batches

__all__ = ["can_be_cut", "first_samples", "pieces_of", "some_samples_of"]

_PIECE_BYTES = 5 << 19
"""Inputs in a piece: four images of 224 px. What a network makes of more falls out of the caches: a forward pass of
EfficientNet-Lite0 takes twice the CPU time with 25 images at once, and the memory of a pass grows with the piece."""


def can_be_cut(batch: Batch) -> bool:
    """Whether the first dimension of all its tensors is the samples."""
    leaves = _tensors(batch)
    return bool(leaves) and all(t.ndim and t.shape[0] == batch.size for t in leaves)


def some_samples_of(batch: Batch, places: Sequence[int]) -> Batch:
    """Copies of the samples at some places (indices) of a batch that can be cut; the batch itself if these are all."""
    if len(places) == batch.size:
        return batch
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t[torch.tensor(places, device=t.device)], (batch.args, batch.kwargs)
    )
    return Batch(args, kwargs)


def pieces_of(batch: Batch, may_be_cut: Callable[[Batch], bool]) -> Iterator[Batch]:
    """The batch in pieces of as few samples as run fast, in order.

    Args:
        batch: small ones, and those that cannot be cut, stay as they are.
        may_be_cut: whether the network gives samples of a batch the same answers in pieces.
    """
    size = batch.size
    sample_bytes = max(1, sum(t.nbytes for t in _tensors(batch)) // max(1, size))
    step = max(1, _PIECE_BYTES // sample_bytes)
    if size <= step or not can_be_cut(batch) or not may_be_cut(batch):
        yield batch
        return
    for start in range(0, size, step):
        yield some_samples_of(batch, range(start, min(start + step, size)))


def first_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first `count` samples; a batch that cannot be cut is taken whole."""
    taken: list[Batch] = []
    for batch in batches:
        rest = count - sum(b.size for b in taken)
        if rest <= 0:
            break
        is_cut = batch.size > rest and can_be_cut(batch)
        is_cut = is_cut and (not isinstance(batches, Batches) or batches.may_be_cut())
        taken.append(some_samples_of(batch, range(rest)) if is_cut else batch)
    return taken


def _tensors(batch: Batch) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
