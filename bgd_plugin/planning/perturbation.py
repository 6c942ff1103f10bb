"""The error that a layer will have, before it is fitted: that of a rough quantization, scaled to the size expected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.graph import FoundLayer, module_at
from bgd_plugin.planning.layer_facts import LayerFacts

__all__ = ["Perturbation", "bias_of", "changed", "changes_of", "has_channel_rows", "holders", "perturbed"]

_TINY = 1e-12
_RATIOS = 0.05, 20.0


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """An error in one layer's weight, and what the corrections of a run make of it.

    Attributes:
        layer: the layer.
        error: rough weight less weight, `[groups, rows_per_group, columns]`, half precision.
        means: of each row's output: of the weight's and of the error's, `[2, rows]`.
        powers: of each row's output around its mean: of the weight, of weight times error, of the error, `[3, rows]`.
        norm: path of the batch norm that follows; its statistics are corrected.
        takes_mean: whether a bias or a batch norm takes the mean out.
    """

    layer: FoundLayer
    error: Tensor
    means: Tensor
    powers: Tensor
    norm: str | None
    takes_mean: bool

    @classmethod
    def of(cls, facts: LayerFacts, rough: Tensor) -> Perturbation:
        """The error of a rough weight.

        Args:
            facts: of the layer.
            rough: `[groups, rows_per_group, columns]`.
        """
        error = (rough - facts.weight).to(torch.bfloat16).float()
        means = [(one @ facts.mean.unsqueeze(2)).flatten() for one in (facts.weight, error)]
        spread = [
            ((one @ facts.covariance) * other).sum(2).flatten()
            for one, other in ((facts.weight, facts.weight), (facts.weight, error), (error, error))
        ]
        return cls(
            layer=facts.layer,
            error=error.to(torch.bfloat16),
            means=torch.stack(means),
            powers=torch.stack(spread),
            norm=facts.norm,
            takes_mean=facts.takes_mean,
        )

    def weight(self, scale: float) -> Tensor:
        """The layer's weight with `scale` times the error, of the layer's own form `[C_out, ...]`."""
        exact = self.layer.matrix.detach().float().reshape(self.error.shape)
        changed = exact + scale * self.error.float()
        if self.norm is not None:
            changed = changed * self.ratio(scale).reshape(changed.shape[0], -1, 1)
        return self.layer.weight_of(changed).to(self.layer.weight)

    def ratio(self, scale: float) -> Tensor:
        """Each row's standard deviation of the output with the exact weight over that with the error, `[rows]`.

        Args:
            scale: factor on the error.
        """
        exact, both, error = self.powers
        found = (exact + 2 * scale * both + scale**2 * error).clamp(min=0)
        ratio: Tensor = ((exact.clamp(min=0) + _TINY) / (found + _TINY)).sqrt().clamp(*_RATIOS)
        return ratio


Change = tuple[Any, str, Any]
"""A module, one of its attributes, and another value for that."""


@contextmanager
def perturbed(network: nn.Module, one: Perturbation, scale: float = 1.0) -> Iterator[None]:
    """The network with `scale` times the error in one layer, and the mean and spread of the layer's output kept."""
    with changed(changes_of(network, one, scale)):
        yield


def changes_of(network: nn.Module, one: Perturbation, scale: float) -> list[Change]:
    """What `perturbed` changes; it can be done and undone many times.

    Args:
        network: the float one.
        one: the error in a layer.
        scale: factor on the error.
    """
    (holder, name), *tied = holders(network, one.layer)
    bias = bias_of(network, one.layer)
    norm: Any = module_at(network, one.norm) if one.norm else None
    exact, error = one.means
    shift = scale * error
    weight = nn.Parameter(one.weight(scale), requires_grad=False)
    changes: list[Change] = [(module, place, weight) for module, place in ((holder, name), *tied)]
    if norm is not None:  # whose rows are scaled, too
        shift = (exact + shift) * one.ratio(scale) - exact
        changes.append((norm, "running_mean", norm.running_mean + shift.to(norm.running_mean)))
    elif one.takes_mean and bias is not None:
        changes.append((holder, "bias", nn.Parameter(bias - shift.to(bias), requires_grad=False)))
    return changes


@contextmanager
def changed(changes: Sequence[Change]) -> Iterator[None]:
    """A context in which modules have other values.

    Args:
        changes: of `changes_of`, of any number of layers.
    """
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


def holders(network: nn.Module, layer: FoundLayer) -> list[tuple[Any, str]]:
    """The modules that hold a layer's weight, that of the layer first, and the weight's name in each."""
    found = []
    for target in (layer.target, *layer.tied):
        owner_path, _, name = target.rpartition(".")
        owner = module_at(network, owner_path)
        found.append((owner, name) if name in owner._parameters else (module_at(network, target), "weight"))
    return found


def bias_of(network: nn.Module, layer: FoundLayer) -> Any:
    """The bias of a module that is called; that of a function's call is not the module's."""
    if layer.functional or not has_channel_rows(layer):
        return None
    return getattr(module_at(network, layer.target), "bias", None)


def has_channel_rows(layer: FoundLayer) -> bool:
    """Whether each row of a layer's matrix is an output channel, whose mean a bias or a batch norm can take out."""
    return not layer.kind.startswith("conv_transpose")
