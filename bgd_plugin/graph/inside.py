"""Find the layers inside a module without a graph, by the submodules and parameters that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bgd_plugin.graph.bare import bare_layers, bias_of
from bgd_plugin.graph.computed import module_at
from bgd_plugin.graph.kinds import FUNCTIONS, family_of, kind_of, layout_of, runs_its_parents_forward
from bgd_plugin.graph.layer import FoundLayer, LeftLayer
from bgd_plugin.graph.tracer import is_quantized_elsewhere
from bgd_plugin.nn import FloatWeight, PQModule
from bgd_plugin.pq.layout import AS_IT_IS

__all__ = ["bias_of", "find_inside", "unfit"]


def find_inside(
    root: nn.Module, path: str = "", calls: tuple[str, ...] = ()
) -> tuple[list[FoundLayer], list[LeftLayer]]:
    """All layers in the module at `path`, in the order of its modules, and all weights left alone.

    Args:
        root: the network; names are paths from here.
        path: of the module to examine.
        calls: names of the nodes that run it.
    """
    found: list[FoundLayer] = []
    left: list[LeftLayer] = []
    others = _other_owners(root)
    for outcome in _outcomes(root, path, calls):
        if not isinstance(outcome, FoundLayer):
            left.append(outcome)
        elif id(outcome.weight) in others:
            reason = f"its weight is also used by {others[id(outcome.weight)]}"
            left.append(LeftLayer(name=outcome.name, reason=reason))
        else:
            found.append(outcome)
    return found, left


def _other_owners(root: nn.Module) -> dict[int, str]:
    """Parameters of modules that stay as they are, such as an embedding with its own forward that is tied to the head.

    Also parameters that several modules read by name: each would need its own weight.
    """
    owners: dict[int, str] = {}
    holders: dict[int, bool] = {}  # whether the module that holds a weight reads it by name
    for name, module in root.named_modules():
        if isinstance(module, (FloatWeight, torch.jit.ScriptModule)):
            continue
        kind = kind_of(module)
        outcomes = [_layer(module, name, kind, ())] if kind else bare_layers(module, name, (), set())
        weights = {id(layer.weight) for layer in outcomes if isinstance(layer, FoundLayer)}
        for key in (id(parameter) for parameter in module._parameters.values() if parameter is not None):
            if key not in weights or (key in holders and (holders[key] or kind is None)):
                owners[key] = f"{name!r}, {type(module).__name__}"
            else:
                holders[key] = kind is None
    return owners


def _outcomes(root: nn.Module, path: str, calls: tuple[str, ...]) -> Iterator[FoundLayer | LeftLayer]:
    prefix = f"{path}." if path else ""
    seen: set[int] = set()
    for inner, module in module_at(root, path).named_modules():
        name = (prefix + inner).rstrip(".")
        if isinstance(module, PQModule):
            yield LeftLayer(name=name, reason="already quantized")
        elif isinstance(module, FloatWeight):
            continue
        elif isinstance(module, torch.jit.ScriptModule):
            if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
                yield LeftLayer(name=name, reason="it is scripted (torch.jit): its code cannot be changed")
        elif is_quantized_elsewhere(module):
            kind = type(module).__name__
            yield LeftLayer(name=name, reason=f"{kind} is already quantized by another library")
        elif kind_of(module):
            yield _layer(module, name, str(kind_of(module)), calls)
        else:
            yield from bare_layers(module, name, calls, seen)


def _layer(module: nn.Module, name: str, kind: str, calls: tuple[str, ...]) -> FoundLayer | LeftLayer:
    weight = module._parameters.get("weight")
    if weight is None:
        if isinstance(module._modules.get("weight"), PQModule):
            return LeftLayer(name=name, reason="already quantized")
        return LeftLayer(
            name=name, reason="its weight is not a parameter (a pruning mask or a hook computes it): bake it first"
        )
    if not weight.is_floating_point():
        return LeftLayer(name=name, reason=f"its weight has dtype {weight.dtype}")
    functional = not runs_its_parents_forward(module)
    if reason := unfit(module, kind, functional=functional):
        return LeftLayer(name=name, reason=reason)
    return FoundLayer(
        name=name,
        target=f"{name}.weight" if functional else name,
        kind=kind,
        family=family_of(kind, weight.shape, getattr(module, "groups", 1)),
        weight=weight,
        calls=calls,
        functional=functional,
        groups=getattr(module, "groups", 1),
        hidden=True,
        bias=None if kind.startswith("conv_transpose") else bias_of(module, name),
        layout=layout_of(kind, getattr(module, "groups", 1)) if functional else AS_IT_IS,
    )


def unfit(module: Any, kind: str, *, functional: bool) -> str:
    """Why a module of a known kind cannot be quantized; empty if it can.

    Args:
        module: of a class in `MODULES`.
        kind: as in `FoundLayer`.
        functional: whether code reads the weight as a tensor instead of calling the module.
    """
    if functional and kind not in FUNCTIONS.values():
        return f"{type(module).__name__} overrides its layer's forward"
    if kind == "embedding" and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq needs its whole weight, or writes to it"
    return ""
