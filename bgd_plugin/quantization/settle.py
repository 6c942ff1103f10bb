"""The form in which a compressed network comes back: a module of the class of the one that went in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from bgd_plugin.calibration import Batch, shared_difference
from bgd_plugin.errors import TraceError
from bgd_plugin.files.placement import transplant_
from bgd_plugin.graph import Front, make_picklable_

__all__ = ["settled"]


def settled(front: Front, student: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """The compressed network in a module of the class of the one that went in.

    Layers, parameters and norm statistics are the student's; all else is as it came, whatever the runs have made of it.

    Raises:
        TraceError: it does not give the answers of the graph that was fitted.
    """
    if front.own is front.network:
        return student
    transplant_(front.own, student, statistics_only=True)
    if isinstance(student, fx.GraphModule) and (reason := shared_difference(student, front.own, batches)):
        raise TraceError(
            f"the compressed {type(front.own).__name__} does not compute the same as the fitted graph: {reason}. Its "
            "code inspects its layers, which a graph does not show: give a GraphModule of it instead"
        )
    make_picklable_(front.own)
    return front.own
