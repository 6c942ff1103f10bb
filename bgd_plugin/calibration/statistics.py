"""What the fit needs to know of a layer's inputs, streamed over the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bgd_plugin.calibration.walk import Walk
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import call_geometry, call_input
from bgd_plugin.pq.blocks import Geometry, sample_inputs, unfold_inputs

__all__ = ["InputSample", "PooledGram", "layer_inputs", "pooled_gram", "sampled_inputs"]

_CHUNK_ELEMENTS = 4_000_000

Inputs = Callable[[], Iterator[tuple[Tensor, Geometry]]]


@dataclass(frozen=True, kw_only=True)
class PooledGram:
    """Second moments of a layer's inputs, all block positions pooled.

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


def layer_inputs(walk: Walk, name: str, calls: tuple[str, ...]) -> Inputs:
    """The inputs of a layer, call by call and batch by batch, as a function that walks over them anew each time.

    Raises (while walking):
        CalibrationError: the input is not a tensor, or not finite.
    """
    nodes = {node.name: node for node in walk.order}

    def inputs() -> Iterator[tuple[Tensor, Geometry]]:
        for call in calls:
            node: fx.Node = nodes[call]
            geometry = call_geometry(walk.student, node)
            for batch in range(walk.batch_count):
                value = walk.student_value(call_input(node), batch)
                if not isinstance(value, Tensor):
                    raise CalibrationError(f"layer {name!r}: its input is a {type(value).__name__}, not a tensor")
                yield value, geometry

    return inputs


@torch.no_grad()
def pooled_gram(inputs: Inputs, block_size: int, name: str) -> PooledGram:
    """Σ x̃ᵀx̃ / n over every block of every input; nothing larger than a chunk of unfolded inputs is ever held.

    Raises:
        CalibrationError: naming the layer whose inputs are not finite.

    **Source**: arXiv 1907.05686, section 3.2, the activations x̃; here only through their Gram matrix.
    """
    total: Tensor | None = None
    count = 0
    for value, geometry in inputs():
        for piece in _pieces(value, geometry):
            blocks = unfold_inputs(piece, geometry).reshape(-1, block_size).float()
            part = blocks.mT @ blocks
            total = part.double() if total is None else total + part
            count += blocks.shape[0]
    if total is None or not count:
        raise CalibrationError(f"layer {name!r}: no input reached it during calibration")
    _require_finite(total, name)
    return PooledGram(gram=total / count, count=count)


@torch.no_grad()
def sampled_inputs(inputs: Inputs, rows: int, batches: int, name: str, generator: torch.Generator) -> InputSample:
    """About `rows` rows of unfolded inputs, spread over all batches.

    Args:
        batches: how many inputs there are to share the rows.
    """
    share = max(1, -(-rows // max(1, batches)))
    samples = [sample_inputs(value, geometry, share, generator).float() for value, geometry in inputs()]
    sample = torch.cat(samples, dim=1)
    _require_finite(sample, name)
    return InputSample(rows=sample)


def _pieces(value: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """Runs of samples whose unfolded inputs stay small."""
    if not geometry.kernel_size or value.ndim == len(geometry.kernel_size) + 1:
        yield value
        return
    kernel = 1
    for size in geometry.kernel_size:
        kernel *= size
    per_sample = max(1, value[:1].numel() * kernel)
    yield from value.split(max(1, _CHUNK_ELEMENTS // per_sample))


def _require_finite(statistic: Tensor, name: str) -> None:
    if not bool(torch.isfinite(statistic).all()):
        raise CalibrationError(
            f"layer {name!r}: its inputs on the calibration data hold NaN or infinite values, or overflow; "
            "check the data and the layers before it"
        )
