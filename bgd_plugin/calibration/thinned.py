"""Logits at some of the tokens: the last layer of a language model is run on these alone.

A head of tens of thousands of words is as much work as a dozen blocks, and some of the tokens are enough to estimate a
loss. A layer is such a head if the network gives the same logits at these tokens when the layer runs on them alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bgd_plugin.calibration.batches import Batch, logits_of
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import state_kept

__all__ = ["ThinHead", "answers_at_some_tokens"]

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

    def gives(self, output: Any, whole: Any) -> bool:
        """Whether an output has the logits of some tokens of another one, up to rounding."""
        some, exact = logits_of(output), logits_of(whole)[:, :: self.every]
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        return some.shape == exact.shape and bool(((some - exact).abs() <= _CLOSE * scale).all())


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
            return (head, some) if all(map(head.gives, some, outputs)) else None
    except (*_FAILURES, CalibrationError):  # the network wants logits at all tokens
        return None


def _shape(output: Any) -> torch.Size:
    try:
        return logits_of(output).shape
    except CalibrationError:
        return torch.Size()
