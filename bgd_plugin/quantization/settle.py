"""The form in which a compressed network comes back: a module of the class of the one that went in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from bgd_plugin.calibration import Batch, shared_difference
from bgd_plugin.errors import TraceError
from bgd_plugin.files.placement import transplant_
from bgd_plugin.graph import Front, followed, make_picklable_
from bgd_plugin.planning.survey import Survey
from bgd_plugin.quantization.finish import round_to_storage_

__all__ = ["settled", "transplanted_into"]


def settled(front: Front, student: nn.Module, survey: Survey, batches: Sequence[Batch]) -> nn.Module:
    """The compressed network in a module of the class of the one that went in, which is that of `front`.

    Layers, parameters and norm statistics are the student's; all else is as it came, whatever the runs have made of it.

    Args:
        front: its own network is changed, and returned, unless it is a graph: then the student is returned.
        student: the compressed network, rounded to its storage types.
        survey: of its layers.
        batches: on which both are compared.

    Raises:
        TraceError: it does not give the answers of the graph that was fitted.
    """
    network = transplanted_into(front.own, student, survey)
    if network is student:
        return student
    if isinstance(student, fx.GraphModule) and (reason := shared_difference(student, network, batches)):
        raise TraceError(
            f"the compressed {type(network).__name__} does not compute the same as the fitted graph: {reason}. Its "
            "code inspects its layers, which a graph does not show: give a GraphModule of it instead"
        )
    make_picklable_(network)
    return network


def transplanted_into(own: nn.Module, student: nn.Module, survey: Survey) -> nn.Module:
    """A network of its own class with the student's layers, in place; the student itself if that class is a graph's.

    Args:
        own: the float network.
        student, survey: as in `settled`.
    """
    if isinstance(own, fx.GraphModule):
        return student
    with followed(own):
        transplant_(own, student, statistics_only=True)
        round_to_storage_(own, survey)  # also what the graph does not use
    return own
