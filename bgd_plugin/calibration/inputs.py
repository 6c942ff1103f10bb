"""A layer's inputs, streamed over the batches, in the compressed network and in the float one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration.live_values import Walk
from bgd_plugin.calibration.spread import enough_batches
from bgd_plugin.calibration.watch import Watch
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import call_geometry, call_input, module_at
from bgd_plugin.pq.blocks import Geometry

__all__ = [
    "CollectedInputs",
    "LayerInputs",
    "SharedInputs",
    "embedding_inputs",
]

_SPARSE = 16
"""A sample has so many times the rows that are drawn from it: neighbours tell much the same."""
_PLAIN = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear
_EXACT = torch.float32, torch.float64
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
        self._batches: Sequence[int] = range(walk.batch_count)
        nodes = {node.name: node for node in walk.order}
        self._calls = [nodes[call] for call in calls]

    def __len__(self) -> int:
        if self._hidden is None:
            return len(self._calls) * len(self._batches)
        if self._count is None:  # as many in each batch as in the first
            self._count = len(self._batches) * sum(len(self._read(node, 0)) for node in self._calls)
        return self._count

    @property
    def batches(self) -> Sequence[int]:
        """The indices of the batches whose inputs these are."""
        return self._batches

    def some(self, rows: int) -> LayerInputs:
        """The inputs in some batches, spread over all, from which so many rows can be drawn as if from all.

        Batches that are left out need not have come to the layer; their inputs are checked to be finite when they do.

        Args:
            rows: of unfolded inputs; a sample has sixteen times as many as are drawn from it.

        Raises:
            CalibrationError: the network fails on a batch.
        """
        if self._hidden is not None or len(self._calls) > 1 or not self._batches:
            return self
        value, geometry = self._read(self._calls[0], 0)[0]
        dimensions = len(geometry.kernel_size)
        if not isinstance(value, Tensor) or value.ndim < 2 or (dimensions and value.ndim != dimensions + 2):
            return self
        spatial = value.shape[2:] if dimensions else value.shape[1:-1]
        positions = math.prod(spatial) // math.prod(geometry.stride)
        chosen = enough_batches(len(self._batches), len(value), positions, _SPARSE * rows)
        if len(chosen) == len(self._batches):
            return self
        self._walk.require_finite(self.name, self._calls)
        result = copy.copy(self)
        result._batches = [self._batches[place] for place in chosen]
        return result

    def __iter__(self) -> Iterator[tuple[Tensor, Geometry]]:
        """Each input, and the geometry of the call.

        Raises:
            CalibrationError: an input is not a tensor.
        """
        for node in self._calls:
            for batch in self._batches:
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
        for batch in self._batches:
            for node in self._calls:
                mine, theirs = self._read(node, batch), self._read(node, batch, of_reference=True)
                if [_shape(x) for x, _ in mine] != [_shape(x) for x, _ in theirs]:
                    theirs = mine  # the float network sent its samples to other experts
                for (own, geometry), (other, _) in zip(mine, theirs, strict=True):
                    yield own, other, geometry

    @property
    def outputs(self) -> Callable[[int], Tensor] | None:
        """The float network's outputs in a batch; None where they may be others than those of inputs and weight.

        That is, where the layer's module is no plain one of torch, has a bias or hooks, or is called several times; or
        where it computes in half precision, which rounds them.
        """
        node = self._calls[0]
        if self._hidden is not None or len(self._calls) > 1 or node.op != "call_module" or self._walk.reference is None:
            return None
        module: Any = module_at(self._walk.reference, str(node.target))
        is_plain = type(module) in _PLAIN and module.bias is None and module.weight.dtype in _EXACT
        if not is_plain or module._forward_hooks or module._forward_pre_hooks or self._walk.current is not node:
            return None
        return functools.partial(self._walk.reference_output, node)

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
        outputs: see `LayerInputs.outputs`.
        count: of all inputs; None: counted when it is asked for.
    """

    def __init__(
        self,
        name: str,
        student: Sequence[Sequence[tuple[Tensor, Geometry]]],
        reference: Sequence[Sequence[tuple[Tensor, Geometry]]],
        shared: SharedInputs | None = None,
        outputs: Callable[[int], Tensor] | None = None,
        count: int | None = None,
    ) -> None:
        self.name, self.shared = name, shared
        self._student, self._reference, self._outputs = student, reference, outputs
        self._count = count

    def __len__(self) -> int:
        return sum(len(calls) for calls in self._student) if self._count is None else self._count

    @property
    def outputs(self) -> Callable[[int], Tensor] | None:
        """The float network's outputs in a batch, without bias; None if they are not at hand."""
        return self._outputs

    @property
    def batches(self) -> Sequence[int]:
        """The indices of all batches."""
        return range(len(self._student))

    def some(self, rows: int) -> LayerInputs:
        """All of them, as they are in memory; `rows` does not matter."""
        del rows
        return self

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


def embedding_inputs(name: str, weight: Tensor) -> CollectedInputs:
    """Inputs that stand for those of an embedding: its outputs are its weights, as if each column were an input.

    Args:
        name: the layer's.
        weight: `[rows, columns]`.
    """
    rows = torch.eye(weight.shape[1], dtype=torch.float32, device=weight.device).repeat(_EMBEDDING_ROWS, 1)
    calls = [[(rows, Geometry.linear())]]
    return CollectedInputs(name, calls, calls)
