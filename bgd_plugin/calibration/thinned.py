"""Logits at some of the tokens: the first ones of a text alone, or the last layer of a language model on some alone.

A head of tens of thousands of words is as much work as a dozen blocks, and some of the tokens are enough to estimate a
loss. A layer is such a head if the network gives the same logits at these tokens when the layer runs on them alone.
Where no token reads later ones, a text may end early: the logits before are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch, logits_of
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import state_kept

__all__ = ["ThinHead", "answers_at_some_tokens", "at_first_tokens"]

_CLOSE = 1e-4
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True, kw_only=True)
class ThinHead:
    """A linear layer that gives a network's logits, token by token.

    Attributes:
        path: of the module.
        every: only every so manieth token has logits, the first one included.
    """

    path: str
    every: int

    @contextmanager
    def thinned(self, network: nn.Module) -> Iterator[None]:
        """A context in which the network's logits `[samples, tokens, classes]` are those of some tokens."""
        with intercepted(network, [self.path], self._on_some):
            yield

    def _on_some(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        return run_module(module, (x[:, :: self.every],), {})


@torch.no_grad()
def at_first_tokens(network: nn.Module, batches: Sequence[Batch], tokens: int) -> list[Batch] | None:
    """The batches with the first tokens of each sample alone.

    Args:
        network: float, in evaluation mode.
        batches: some.
        tokens: number that each sample keeps.

    Returns:
        None where a sample has no more, or where the network's logits there are others without the later tokens.
    """
    short: list[Batch] = []
    for batch in batches:
        leaves = [t for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)]
        shapes = {tuple(t.shape[:2]) for t in leaves}
        length = leaves[0].shape[1] if len(shapes) == 1 and leaves[0].ndim > 1 else 0
        if length <= tokens:
            return None
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t[:, :tokens].clone(), (batch.args, batch.kwargs))
        short.append(Batch(args, kwargs))
        try:
            with state_kept(network.named_modules()):
                whole = batch.call(network)
                if _shape(whole)[1:2] != (length,) or len(_shape(whole)) != 3:
                    return None
                if not _same(short[-1].call(network), logits_of(whole)[:, :tokens]):
                    return None
        except (*_FAILURES, CalibrationError):  # the network wants all tokens
            return None
    return short


@torch.no_grad()
def answers_at_some_tokens(
    network: nn.Module, batches: Sequence[Batch], outputs: Sequence[Any], most: int
) -> tuple[ThinHead, list[Any]] | None:
    """The layer that can be run on some of the tokens, and the network's outputs with their logits alone.

    Args:
        network: float, in evaluation mode.
        batches: some.
        outputs: of the network, one for each batch, whose logits are compared.
        most: logits that are wanted, of all batches.

    Returns:
        None where there are fewer than twice as many, or where no layer gives the logits token by token.
    """
    shapes = [_shape(output) for output in outputs]
    every = sum(map(torch.Size.numel, shapes)) // most
    words = {shape[2] if len(shape) == 3 else 0 for shape in shapes}
    heads = [path for path, m in network.named_modules() if isinstance(m, nn.Linear) and words == {m.out_features}]
    if every < 2 or not heads:
        return None
    head = ThinHead(path=heads[-1], every=every)
    try:
        with state_kept(network.named_modules()), head.thinned(network):
            some = [batch.call(network) for batch in batches]
            wanted = [logits_of(output)[:, ::every] for output in outputs]
            return (head, some) if all(map(_same, some, wanted)) else None
    except (*_FAILURES, CalibrationError):  # the network wants logits at all tokens
        return None


def _same(output: Any, exact: Tensor) -> bool:
    """Whether an output has these logits, up to rounding."""
    found = logits_of(output)
    if found.shape != exact.shape:
        return False
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    return bool(((found - exact).abs() <= _CLOSE * scale).all())


def _shape(output: Any) -> torch.Size:
    try:
        return logits_of(output).shape
    except CalibrationError:
        return torch.Size()
