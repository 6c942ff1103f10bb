"""Which samples show what a layer's inputs are, and what its error does to the answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch, Batches, at_first_tokens, first_samples

__all__ = ["few_samples", "spread"]

_SAMPLES_OF_MOMENTS = 64  # at the least: a layer's facts are those of 4,096 rows of its inputs
_TOKENS_OF_MOMENTS = 4096  # that do as well, of texts
_BATCHES_OF_MOMENTS = 8  # at the least: data may be sorted by class
_TEXTS, _TOKENS = 2, 64  # of which only so many, where a language model's logits do not depend on later ones


def few_samples(network: nn.Module, batches: Sequence[Batch], count: int) -> tuple[Batches, int]:
    """The samples that run to the network's end: the first ones; where texts may end early, no less than two of them.

    Args:
        network: float, in evaluation mode.
        batches: the calibration data.
        count: number of samples.

    Returns:
        the samples, and how many tokens a text that may end early has; 1 for other samples.
    """
    some = _some_of(batches, count)
    short = at_first_tokens(network, some, _TOKENS)
    if short is None:
        return some, 1
    if count < _TEXTS:
        return few_samples(network, batches, _TEXTS)
    tokens = next(leaf for leaf in pytree.tree_leaves((some[0].args, some[0].kwargs)) if isinstance(leaf, Tensor))
    return Batches.of(short, some.store.bound_bytes), tokens.shape[1]


def _some_of(batches: Sequence[Batch], count: int) -> Batches:
    """The first samples, with values of their own: they take an eighth of what all batches may take in memory."""
    bound = Batches.of(batches).store.bound_bytes
    return Batches.of(first_samples(batches, count), None if bound is None else max(1, bound // 8))


def spread(batches: Sequence[Batch], tokens: int) -> Sequence[Batch]:
    """Every so manieth batch: as many as moments are taken of, all over the data.

    Args:
        batches: the calibration data.
        tokens: number of them in a sample, as `few_samples` gives it.
    """
    enough = min(_SAMPLES_OF_MOMENTS, -(-_TOKENS_OF_MOMENTS // tokens))
    step = min(sum(batch.size for batch in batches) // enough, len(batches) // _BATCHES_OF_MOMENTS)
    if step < 2:
        return batches
    chosen = (batches[index] for index in range(0, len(batches), step))
    return Batches.of(chosen, Batches.of(batches).store.bound_bytes)
