"""The front end: from the network that a user gives to the form that the library works on."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import ExportedProgram

from bgd_plugin.errors import ConfigError, TraceError
from bgd_plugin.graph.copying import require_initialized
from bgd_plugin.graph.fold import fold_parametrizations_
from bgd_plugin.graph.tracer import trace

__all__ = ["front_end", "unwrapped"]


def front_end(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A graph over the same modules where the network traces whole, otherwise the network itself.

    Parametrized weights are folded first, in place: give a copy.

    Returns:
        the network, and which weights were folded: from the layer's name to what computed its weight.
    """
    folded = fold_parametrizations_(model)
    try:
        return trace(model), folded
    except TraceError:
        return model, folded


def unwrapped(model: nn.Module | ExportedProgram) -> nn.Module:
    """The network itself: out of an exported program, of `torch.compile`, of `DataParallel`.

    Raises:
        ConfigError: a scripted network, whose code cannot be changed, lazy layers that have never run, or something
            that is no network.
    """
    if isinstance(model, ExportedProgram):
        return model.module()
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "the network is scripted (torch.jit), so its layers cannot be replaced: give the network that it was made "
            "from, and script nothing afterwards"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):
        return unwrapped(original)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the network is a {type(model).__name__}: give a torch.nn.Module or an ExportedProgram")
    require_initialized(model)
    return model
