"""The form in which a network is fitted: as a graph only if the graph gives the network's own outputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from bgd_plugin.calibration.agreement import difference, given_arguments
from bgd_plugin.calibration.batches import Batch
from bgd_plugin.errors import TraceError
from bgd_plugin.graph import FROM_DATA, Front, retraced
from bgd_plugin.support.processes import largest

__all__ = ["checked", "shared_difference"]


def checked(front: Front, batches: Sequence[Batch]) -> Front:
    """The network as it will be fitted: as a graph only if the graph gives the network's own outputs.

    Args:
        front: the network, and the graph made of it without data.
        batches: calibration batches, on which both are run.

    Raises:
        CalibrationError: the network does not accept a batch, or fails on it.
        TraceError: the caller gave a graph whose nodes do not give its outputs.
    """
    given = given_arguments(front.own, batches)
    if isinstance(front.own, fx.GraphModule):
        if reason := shared_difference(front.own, front.own, batches):
            raise TraceError(
                f"the network does more than its graph: {reason}. A hook on the graph module itself, or a "
                "replaced forward, is not among its nodes: remove it, or give the network that was traced"
            )
        return front
    if given is not None and not _is_as_planned(front.own, given):
        front = retraced(front, given)
    if not isinstance(front.network, fx.GraphModule):
        return front
    if reason := shared_difference(front.network, front.own, batches):
        return dataclasses.replace(front, network=front.own, reason=reason)
    return front


def _is_as_planned(network: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a network is called as `front_end` assumed: with data for exactly the arguments without a default."""
    parameters = inspect.signature(network.forward).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return given.keys() == needed and all(value is FROM_DATA for value in given.values())


def shared_difference(graph: fx.GraphModule, network: nn.Module, batches: Sequence[Batch]) -> str:
    """`difference` between a graph and a network on the batches; a difference in one process counts in all."""
    found = difference(graph, network, batches)
    return found or ("they differ on another process's batches" if largest(bool(found)) else "")
