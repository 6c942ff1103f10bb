"""Hold large float weights of a network as narrow as in its file, and undo it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from bgd_plugin.encoding.narrow import to_narrow
from bgd_plugin.graph.references import rebind_
from bgd_plugin.graph.replace import materialize_, swap_
from bgd_plugin.nn import NarrowModule, narrowed

__all__ = ["narrow_", "widen_"]

_LEAST = 1 << 20
"""Weights below which a float layer stays as it is: its weight is no more than a tile."""


def narrow_(network: nn.Module) -> nn.Module:
    """Hold each large embedding and linear layer that is still float in half precision or 8 bits, where that is exact.

    Left alone: weights that code other than torch's own layers may read as parameters, those that are not on a CPU, and
    networks in training mode, whose parameters are to be trained.

    Args:
        network: changed in place.

    Returns:
        `network`.
    """
    if network.training or any(isinstance(module, fx.GraphModule) for module in network.modules()):
        return network
    readers: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            readers.setdefault(id(parameter), []).append((path, module, name))
    for group in readers.values():
        weight = group[0][1]._parameters[group[0][2]]
        if weight is None or weight.numel() < _LEAST or not weight.is_cpu or weight.grad is not None:
            continue
        form = to_narrow(weight.detach()) if all(_can_be_narrow(*reader) for reader in group) else None
        if form is not None:
            _narrow(network, group, form)
    return network


def widen_(network: nn.Module) -> nn.Module:
    """Undo `narrow_` in place: ordinary layers with a float parameter, which tied layers share.

    Args:
        network: changed in place.

    Returns:
        `network`.
    """
    return materialize_(network, {path for path, m in network.named_modules() if isinstance(m, NarrowModule)})


def _can_be_narrow(path: str, module: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a layer that runs torch's own code."""
    is_linear = type(module) is nn.Linear
    is_embedding = type(module) is nn.Embedding and module.max_norm is None
    return bool(path) and name == "weight" and (is_linear or is_embedding) and "forward" not in vars(module)


def _narrow(network: nn.Module, group: list[tuple[str, nn.Module, str]], form: tuple[Tensor, Tensor]) -> None:
    for path, module, _ in group:
        layer: Any = module
        narrow = narrowed(layer, *form)
        swap_(network, path, narrow)
        rebind_(narrow, {id(module): narrow})
