"""The layer at a known path, without a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from bgd_plugin.graph.bare import bare_layers, bias_of
from bgd_plugin.graph.computed import module_or_none
from bgd_plugin.graph.kinds import family_of, kind_of, layout_of, runs_its_parents_forward
from bgd_plugin.graph.layer import FoundLayer
from bgd_plugin.pq.layout import AS_IT_IS

__all__ = ["layer_at"]


def layer_at(network: nn.Module, target: str, tied: Sequence[str] = ()) -> FoundLayer | None:
    """The layer at a target: a module that computes as its base class, or a parameter; None if there is neither.

    Args:
        network: not a graph.
        target: path of the module or of the parameter.
        tied: other targets that will have the same codes.
    """
    module = module_or_none(network, target)
    path, _, attribute = target.rpartition(".")
    functional = module is None
    owner = module_or_none(network, path) if functional else module
    weight = None if owner is None else owner._parameters.get(attribute if functional else "weight")
    if owner is None or weight is None or not (functional or runs_its_parents_forward(owner)):
        return None
    others = tuple(other for other in tied if _is_another(network, other, owner, functional=functional))
    if functional and kind_of(owner) is None:
        read = (layer for layer in bare_layers(owner, path, (), set()) if isinstance(layer, FoundLayer))
        found = next((layer for layer in read if layer.target == target), None)
        if found is not None:
            return dataclasses.replace(found, tied=others)
    kind = (kind_of(owner) if attribute == "weight" or not functional else None) or "linear"
    groups = getattr(owner, "groups", 1)
    return FoundLayer(
        name=target,
        target=target,
        kind=kind,
        family=family_of(kind, weight.shape, groups),
        weight=weight,
        calls=(),
        functional=functional,
        groups=groups,
        hidden=True,
        bias=None if functional else bias_of(owner, target),
        tied=others,
        layout=layout_of(kind, groups) if functional else AS_IT_IS,
    )


def _is_another(network: nn.Module, target: str, owner: nn.Module, *, functional: bool) -> bool:
    """Whether the module at a target is another one than `owner`; a shared module has several paths."""
    return module_or_none(network, target.rpartition(".")[0] if functional else target) is not owner
