"""Rows of a layer's unfolded inputs: a sample, or at the same positions in both networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration.finite import require_finite
from bgd_plugin.calibration.inputs import LayerInputs
from bgd_plugin.pq.blocks import Geometry, sample_inputs
from bgd_plugin.pq.maps import Maps
from bgd_plugin.support.processes import processes, rank, total

__all__ = ["InputSample", "PairedRows", "paired_pieces", "sampled_inputs"]

_WHOLE = 2
"""Up to so many times the positions of a sample, all of them are less work where maps give the moments."""


@dataclass(frozen=True, kw_only=True)
class InputSample:
    """Some rows of a layer's unfolded inputs: `[groups, positions, columns]`."""

    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class PairedRows:
    """Rows of unfolded inputs at the same positions in both networks.

    Attributes:
        inputs: the student's, as `student` gives them, or the maps all of whose rows these are.
        reference: the float network's; or its outputs `[groups, positions, rows_per_group]`, if they are asked for.
        drift: additional target for the layer's outputs there, `[positions, rows]`; None: none.
        stream: what the float network adds the layer's outputs to there, `[positions, rows]`; None: not known.
        index: number of this piece among all `pieces`, including those of other processes.
    """

    inputs: Tensor | Maps
    reference: Tensor
    index: int
    pieces: int
    drift: Tensor | None = None
    stream: Tensor | None = None

    @functools.cached_property
    def student(self) -> Tensor:
        """The student's unfolded inputs, `[groups, positions, columns]`."""
        return self.inputs.rows() if isinstance(self.inputs, Maps) else self.inputs


@torch.no_grad()
def paired_pieces(
    inputs: LayerInputs,
    rows: int,
    generator: torch.Generator,
    drift: Callable[[int], Tensor] | None = None,
    stream: Callable[[int], Tensor] | None = None,
    outputs: Callable[[int], Tensor] | None = None,
) -> Iterator[PairedRows]:
    """About `rows` rows of unfolded inputs, at the same positions in student and float network.

    If several processes share the data, `rows` is the total over all of them, and pieces alternate between processes.
    Pieces are in the order of the samples, so the last ones contain images that are not in the first ones. Where the
    outputs are given, and `Maps` spare work, a piece with up to twice the positions of its share is taken whole.

    Args:
        drift: for each batch a tensor of the shape of the layer's output, sampled at the same positions; only for
            layers with one call.
        stream: the same of what the float network adds the outputs to.
        outputs: the same of the float network's outputs, which are drawn in place of its inputs.

    Raises:
        CalibrationError: the layer's inputs are not finite.
    """
    inputs = inputs.some(rows)
    pieces = int(total(len(inputs)))
    share = max(1, -(-rows // pieces))
    # each piece's draws depend on its number only, so the rows do not depend on the number of processes
    seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))

    def drawn(value: Tensor, geometry: Geometry, index: int, count: int = share) -> Tensor:
        sample = sample_inputs(value, geometry, count, torch.Generator().manual_seed(seed + index)).float()
        require_finite(sample, inputs.name)
        return sample

    for number, (mine, theirs, geometry) in enumerate(inputs.pairs()):
        index = number * processes() + rank()
        maps = Maps.of(mine, geometry, most=_WHOLE * share) if stream is None and outputs is not None else None
        if maps is not None:
            require_finite(maps.values, inputs.name)
        student = maps or drawn(mine, geometry, index)
        count = share if maps is None else maps.positions
        lost, carried, wanted = (
            None if values is None else drawn(values(inputs.batches[number]), geometry.pointwise(), index, count)[0]
            for values in (drift, stream, outputs)
        )
        if wanted is not None:
            reference = wanted.reshape(len(wanted), geometry.groups, -1).transpose(0, 1)
        elif theirs is mine and isinstance(student, Tensor):
            reference = student
        else:
            reference = drawn(theirs, geometry, index)
        yield PairedRows(inputs=student, reference=reference, index=index, pieces=pieces, drift=lost, stream=carried)


@torch.no_grad()
def sampled_inputs(inputs: LayerInputs, rows: int, generator: torch.Generator) -> InputSample:
    """About `rows` rows of unfolded inputs, spread over batches and calls.

    Raises:
        CalibrationError: the layer's inputs are not finite.
    """
    inputs = inputs.some(rows)
    share = max(1, -(-rows // len(inputs)))
    samples = []
    for value, geometry in inputs:
        require_finite(value, inputs.name)  # the whole input, not only the sampled rows
        samples.append(sample_inputs(value, geometry, share, generator).float())
    return InputSample(rows=torch.cat(samples, dim=1))
