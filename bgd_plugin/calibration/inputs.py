"""A layer's inputs, streamed over the batches, and their statistics for the fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bgd_plugin.calibration.walk import Walk
from bgd_plugin.calibration.watch import Watch
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import call_geometry, call_input
from bgd_plugin.pq.blocks import Geometry, input_blocks, sample_inputs
from bgd_plugin.support.processes import processes, rank, sum_, total

__all__ = [
    "CollectedInputs",
    "InputSample",
    "LayerInputs",
    "PairedRows",
    "PooledGram",
    "SharedInputs",
    "paired_pieces",
    "pooled_gram",
    "require_finite",
    "sampled_inputs",
]

_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class PooledGram:
    """Second moments of a layer's inputs, pooled over all block positions.

    Attributes:
        gram: `[block_size, block_size]`, the mean of x xᵀ over all blocks of all inputs.
        count: number of pooled blocks.
    """

    gram: Tensor
    count: int


@dataclass(frozen=True, kw_only=True)
class InputSample:
    """Some rows of a layer's unfolded inputs: `[groups, positions, columns]`."""

    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class PairedRows:
    """Rows of unfolded inputs at the same positions in both networks.

    Attributes:
        student, reference: unfolded inputs, both `[groups, positions, columns]`.
        drift: additional target for the layer's outputs there, `[positions, rows]`; None: none.
        index: number of this piece among all `pieces`, including those of other processes.
    """

    student: Tensor
    reference: Tensor
    index: int
    pieces: int
    drift: Tensor | None = None


@dataclass(kw_only=True)
class SharedInputs:
    """What several layers that compute on one and the same input have in common.

    Attributes:
        name: of the first of them.
        statistics: what the first one that is fitted has gathered; None before.
    """

    name: str
    statistics: Any = None


class LayerInputs:
    """The inputs of a layer, call by call and batch by batch; each walk over them starts anew.

    Args:
        walk: stands at the layer's first call.
        name: the layer's, for errors.
        calls: names of the nodes that compute with the layer's weight.
        hidden: the weight, where the nodes hide what it computes with.
    """

    shared: SharedInputs | None = None
    """Set where other layers have the very same inputs."""

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
        """Each input, and how the call walks over it.

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
        """Each input of the student, the float network's at the same place, and how the call walks over them.

        Batch by batch, so that the last ones are of samples that the first ones have not seen.
        """
        for batch in range(self._walk.batch_count):
            for node in self._calls:
                mine, theirs = self._read(node, batch), self._read(node, batch, of_reference=True)
                if [_shape(x) for x, _ in mine] != [_shape(x) for x, _ in theirs]:
                    theirs = mine  # it sent its samples to other experts
                for (own, geometry), (other, _) in zip(mine, theirs, strict=True):
                    yield own, other, geometry

    def _read(self, node: fx.Node, batch: int, *, of_reference: bool = False) -> list[tuple[Tensor, Geometry]]:
        """What a node computes on with the layer's weight, and how."""
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
        student, reference: for each batch the input of each call, and how the call walks over it.
        shared: where other layers have the very same inputs.
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
        """Each input, and how the call walks over it."""
        for calls in self._student:
            yield from calls

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Geometry]]:
        """Each input of the student, the float network's at the same place, and how the call walks over them."""
        for mine, theirs in zip(self._student, self._reference, strict=True):
            for (own, geometry), (other, _) in zip(mine, theirs, strict=True):
                yield own, other, geometry


@torch.no_grad()
def paired_pieces(
    inputs: LayerInputs, rows: int, generator: torch.Generator, drift: Callable[[int], Tensor] | None = None
) -> Iterator[PairedRows]:
    """About `rows` rows of unfolded inputs in `len(inputs)` pieces, at the same positions in student and float network.

    If several processes share the data, `rows` is the total over all of them, and pieces alternate between processes.
    Pieces are in the order of the samples, so the last ones contain images that are not in the first ones.

    Args:
        drift: for each batch a tensor of the shape of the layer's output, sampled at the same positions; only for
            layers with one call.

    Raises:
        CalibrationError: the layer's inputs are not finite.
    """
    pieces = int(total(len(inputs)))
    share = max(1, -(-rows // pieces))
    # each piece's draws depend on its number only, so the rows do not depend on the number of processes
    seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))

    def drawn(value: Tensor, geometry: Geometry, index: int) -> Tensor:
        sample = sample_inputs(value, geometry, share, torch.Generator().manual_seed(seed + index)).float()
        require_finite(sample, inputs.name)
        return sample

    for number, (mine, theirs, geometry) in enumerate(inputs.pairs()):
        index = number * processes() + rank()
        student = drawn(mine, geometry, index)
        reference = student if theirs is mine else drawn(theirs, geometry, index)
        lost = None if drift is None else drawn(drift(number), geometry.pointwise(), index)[0]
        yield PairedRows(student=student, reference=reference, index=index, pieces=pieces, drift=lost)


@torch.no_grad()
def pooled_gram(inputs: LayerInputs, block_size: int) -> PooledGram:
    """Σ x̃ᵀx̃ / n over every block of every input, computed from chunks of unfolded inputs.

    Raises:
        CalibrationError: the layer's inputs are not finite, or no input reached it.

    **Source**: arXiv 1907.05686, section 3.2, the activations x̃; here only through their Gram matrix.
    """
    gram: Tensor | None = None
    count = 0
    for value, geometry in inputs:
        for piece in _pieces(value, geometry):
            blocks = input_blocks(piece, geometry, block_size).float()
            part = (blocks @ blocks.mT).double()
            gram = part if gram is None else gram + part
            count += blocks.shape[1]
    if gram is None or not count:
        raise CalibrationError(f"layer {inputs.name!r}: no input reached it during calibration")
    sum_([gram])
    count = int(total(count))
    require_finite(gram, inputs.name)
    return PooledGram(gram=gram / count, count=count)


@torch.no_grad()
def sampled_inputs(inputs: LayerInputs, rows: int, generator: torch.Generator) -> InputSample:
    """About `rows` rows of unfolded inputs, spread over all batches and calls.

    Raises:
        CalibrationError: the layer's inputs are not finite.
    """
    share = max(1, -(-rows // len(inputs)))
    samples = []
    for value, geometry in inputs:
        require_finite(value, inputs.name)  # the whole input, not only the sampled rows
        samples.append(sample_inputs(value, geometry, share, generator).float())
    return InputSample(rows=torch.cat(samples, dim=1))


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _pieces(value: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Slices of samples whose unfolded inputs fit in a chunk."""
    if not geometry.kernel_size or value.ndim == len(geometry.kernel_size) + 1:
        yield value
        return
    kernel = 1
    for size in geometry.kernel_size:
        kernel *= size
    per_sample = max(1, value[:1].numel() * kernel)
    yield from torch.split(value, max(1, _CHUNK_ELEMENTS // per_sample))


def require_finite(statistic: Tensor, name: str) -> None:
    """Check that a statistic of a layer's inputs is finite.

    Raises:
        CalibrationError: it is not finite; the message names the layer.
    """
    if not bool(torch.isfinite(statistic).all()):
        raise CalibrationError(
            f"layer {name!r}: its inputs on the calibration data contain NaN or infinite values, or overflow; "
            "check the data and the layers before it"
        )
