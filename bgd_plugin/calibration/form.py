"""The form in which a network is fitted: as a graph only where that gives the network's own answers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from bgd_plugin.calibration.agreement import difference, given_arguments
from bgd_plugin.calibration.batches import Batch
from bgd_plugin.errors import TraceError
from bgd_plugin.graph import FROM_DATA, Front, copy_module, retraced
from bgd_plugin.support.processes import largest

__all__ = ["checked", "shared_difference"]


def checked(front: Front, batches: Sequence[Batch]) -> Front:
    """The network as it will be fitted: as a graph only where that gives the network's own answers.

    Raises:
        CalibrationError: batches that the network does not take, or on which it fails.
        TraceError: a graph of the user's whose nodes do not give its answers, for which there is no other way.
    """
    given = given_arguments(front.own, batches)
    if isinstance(front.own, fx.GraphModule):
        if reason := shared_difference(front.own, front.own, batches):
            raise TraceError(
                f"the network does more than its graph: {reason}. A hook on the graph module itself, or a "
                "replaced forward, is not among its nodes: take it off, or give the network that the graph was made of"
            )
        return front
    if given is not None and not _is_as_planned(front.own, given):
        front = retraced(front, given)
    if not isinstance(front.network, fx.GraphModule):
        return front
    if reason := shared_difference(front.network, front.own, batches):
        working: nn.Module = copy_module(front.own, share_tensors=True)
        return dataclasses.replace(front, network=working, reason=reason)
    return front


def _is_as_planned(network: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a network is called as `front_end` took it to be: with every argument that has no default, from data."""
    parameters = inspect.signature(network.forward).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return given.keys() == needed and all(value is FROM_DATA for value in given.values())


def shared_difference(graph: fx.GraphModule, network: nn.Module, batches: Sequence[Batch]) -> str:
    """As `difference`; of several processes, all go the same way."""
    found = difference(graph, network, batches)
    return found or ("they differ on another process's batches" if largest(bool(found)) else "")
