"""The front end: from the caller's network to the form in which the library works on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from bgd_plugin.errors import ConfigError, TraceError
from bgd_plugin.graph.copying import copy_module, require_initialized
from bgd_plugin.graph.fold import fold_parametrizations_
from bgd_plugin.graph.tracer import trace

__all__ = ["Front", "front_end", "retraced", "unwrapped"]


@dataclass(frozen=True, kw_only=True)
class Front:
    """A network as the library works on it.

    Attributes:
        own: a copy of the network, of its own class, with plain weights; it receives the compressed layers.
        network: in the form in which the layers are fitted: a graph over the modules of `own`; `own` itself if that is
            a graph, or cannot be traced. Layers are fitted in copies of it.
        folded: layers whose weight was computed, and by what.
        reason: why `network` is not a graph; empty if it is one.
    """

    own: nn.Module
    network: nn.Module
    folded: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def front_end(model: nn.Module, *, share_tensors: bool = False) -> Front:
    """A network in the forms in which the library works on it; parametrized weights are folded.

    Args:
        model: the caller's network; not changed.
        share_tensors: share the caller's parameters instead of copying them; never write to them.
    """
    own: nn.Module = copy_module(model, share_tensors=share_tensors)
    folded = fold_parametrizations_(own)
    if isinstance(own, fx.GraphModule):
        return Front(own=own, network=own, folded=folded)
    return retraced(Front(own=own, network=own, folded=folded), None)


def retraced(front: Front, given: Mapping[str, Any] | None) -> Front:
    """The same network, traced for the arguments of its calls, `given` as for `trace`; None: unknown."""
    try:
        return dataclasses.replace(front, network=trace(front.own, given), reason="")
    except TraceError as error:
        return dataclasses.replace(front, network=front.own, reason=error.reason)


def unwrapped(model: nn.Module | ExportedProgram) -> nn.Module:
    """The network inside `model`: an exported program, or a wrapper of `torch.compile` or `DataParallel`.

    Raises:
        ConfigError: a scripted network, whose code cannot be changed; lazy layers that have never run; not a network.
    """
    if isinstance(model, ExportedProgram):
        return model.module()
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "the network is scripted (torch.jit), so its layers cannot be replaced: give the network as it was "
            "before scripting"
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
