"""A layer's inputs, streamed over the batches, in the compressed network and in the float one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bgd_plugin.calibration.live_values import Walk
from bgd_plugin.calibration.watch import Watch
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import call_geometry, call_input
from bgd_plugin.pq.blocks import Geometry

__all__ = [
    "CollectedInputs",
    "LayerInputs",
    "SharedInputs",
    "embedding_inputs",
    "require_finite",
]

_EMBEDDING_ROWS = 5
"""Of a fit's inputs, one in five is held out."""


@dataclass(kw_only=True)
class SharedInputs:
    """Shared by several layers that have the same input.

    Attributes:
        name: of the first of them.
        statistics: gathered by the first one that is fitted; None before.
    """

    name: str
    statistics: Any = None


class LayerInputs:
    """The inputs of a layer, call by call and batch by batch; each iteration starts at the beginning.

    Args:
        walk: positioned at the layer's first call.
        name: the layer's, for errors.
        calls: names of the nodes that compute with the layer's weight.
        hidden: the weight, if its inputs are not visible in the graph, as inside an attention module.
    """

    shared: SharedInputs | None = None
    """Set if other layers have the same inputs."""

    def __init__(self, walk: Walk, name: str, calls: Sequence[str], hidden: Tensor | None = None) -> None:
        self.name = name
        self._walk = walk
        self._hidden = hidden
        self._count: int | None = None
        nodes = {node.name: node for node in walk.order}
        self._calls = [nodes[call] for call in calls]

    def __len__(self) -> int:
        if self._hidden is None:
            return len(self._calls) * self._walk.batch_count
        if self._count is None:  # as many in each batch as in the first
            self._count = self._walk.batch_count * sum(len(self._read(node, 0)) for node in self._calls)
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Geometry]]:
        """Each input, and the geometry of the call.

        Raises:
            CalibrationError: an input is not a tensor.
        """
        for node in self._calls:
            for batch in range(self._walk.batch_count):
                for value, geometry in self._read(node, batch):
                    if not isinstance(value, Tensor):
                        raise CalibrationError(
                            f"layer {self.name!r}: its input is a {type(value).__name__}, not a tensor"
                        )
                    yield value, geometry

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Geometry]]:
        """Each input of the student, the float network's input there (of the same shape), and the geometry of the call.

        In the order of the batches, so that the last ones contain other samples than the first ones.
        """
        for batch in range(self._walk.batch_count):
            for node in self._calls:
                mine, theirs = self._read(node, batch), self._read(node, batch, of_reference=True)
                if [_shape(x) for x, _ in mine] != [_shape(x) for x, _ in theirs]:
                    theirs = mine  # the float network sent its samples to other experts
                for (own, geometry), (other, _) in zip(mine, theirs, strict=True):
                    yield own, other, geometry

    def _read(self, node: fx.Node, batch: int, *, of_reference: bool = False) -> list[tuple[Tensor, Geometry]]:
        """The inputs that meet the layer's weight in a node, and their geometries."""
        if self._hidden is None:
            value = self._walk.reference_value if of_reference else self._walk.student_value
            return [(value(call_input(node), batch), call_geometry(self._walk.student, node))]
        calls: list[tuple[Tensor, Geometry]] = []

        def on_call(_: str, x: Tensor, geometry: Geometry | None) -> None:
            if geometry is not None:
                calls.append((x.detach().clone(), geometry))

        watch = Watch({self.name: self._hidden}, on_call)
        with torch.no_grad():
            self._walk.run_ahead(node, batch, watch, of_reference=of_reference)
        return calls


class CollectedInputs(LayerInputs):
    """The inputs of a layer, held in memory.

    Args:
        name: the layer's, for errors.
        student, reference: for each batch the input of each call, and the call's geometry.
        shared: set if other layers have the same inputs.
    """

    def __init__(
        self,
        name: str,
        student: Sequence[Sequence[tuple[Tensor, Geometry]]],
        reference: Sequence[Sequence[tuple[Tensor, Geometry]]],
        shared: SharedInputs | None = None,
    ) -> None:
        self.name, self.shared = name, shared
        self._student, self._reference = student, reference

    def __len__(self) -> int:
        return sum(len(calls) for calls in self._student)

    def __iter__(self) -> Iterator[tuple[Tensor, Geometry]]:
        """Each input, and the geometry of the call."""
        for calls in self._student:
            yield from calls

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Geometry]]:
        """Each input of the student, the float network's input there (of the same shape), and the call's geometry."""
        for mine, theirs in zip(self._student, self._reference, strict=True):
            for (own, geometry), (other, _) in zip(mine, theirs, strict=True):
                yield own, other, geometry


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def require_finite(statistic: Tensor, name: str) -> None:
    """Check that a statistic of a layer's inputs is finite.

    Args:
        statistic: any shape.
        name: the layer's, for the message.

    Raises:
        CalibrationError: it is not finite; the message names the layer.
    """
    # a sum is finite only if all its terms are, and is computed several times faster; a large one may overflow
    if not (math.isfinite(float(statistic.sum())) or bool(torch.isfinite(statistic).all())):
        raise CalibrationError(
            f"layer {name!r}: its inputs on the calibration data contain NaN or infinite values, or overflow; "
            "check the data and the layers before it"
        )


def embedding_inputs(name: str, weight: Tensor) -> CollectedInputs:
    """Inputs that stand for those of an embedding: its outputs are its weights, as if each column were an input.

    Args:
        name: the layer's.
        weight: `[rows, columns]`.
    """
    rows = torch.eye(weight.shape[1], dtype=torch.float32, device=weight.device).repeat(_EMBEDDING_ROWS, 1)
    calls = [[(rows, Geometry.linear())]]
    return CollectedInputs(name, calls, calls)
