"""Rotate a residual stream, in place: the rotation goes into the layers that write to it and those that read it.

A stream h becomes h R. A layer that adds x Wᵀ adds x (Rᵀ W)ᵀ. A norm without gain gives n(h R) = n(h) R, since R keeps
lengths, and, for a norm that subtracts the mean, the vector of ones. A layer that reads g · n(h) + b by W reads n(h) R
by W diag(g) R, and W b goes into its bias.

**Source**: Ashkboos et al., SliceGPT, arXiv 2401.15024, section 3, and QuaRot, arXiv 2404.00456, for random rotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bgd_plugin.graph import module_at, swap_
from bgd_plugin.nn import RotatedNorm
from bgd_plugin.rotation.matrices import orthogonal
from bgd_plugin.rotation.norms import Affine, affine_of, neutralize_
from bgd_plugin.rotation.structure import Heads, Part, Stream, Structure

__all__ = ["Obstacle", "StreamPlan", "rotate_heads_", "rotate_stream_", "stream_plan"]

_NORMS_PER_MATRIX = 3
"""A stream has one matrix that stays for at least so many norms; otherwise it costs more than it brings."""

_Parameters = Mapping[str, nn.Parameter]


class Obstacle(Exception):
    """Why something cannot be rotated."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """How a stream is rotated.

    Attributes:
        stream: what is known of it.
        features: its width.
        affines: of its norms, by path.
        unfolded: paths of the norms whose gain stays in a matrix behind them, and whether that leads to a head that is
            tied to an embedding of the stream, rather than out of the rotation.
    """

    stream: Stream
    features: int
    affines: dict[str, Affine]
    unfolded: dict[str, bool]


def stream_plan(network: nn.Module, structure: Structure, stream: Stream) -> StreamPlan:
    """Check that a stream can be rotated.

    Raises:
        Obstacle: it cannot.
    """
    if stream.obstacle:
        raise Obstacle(stream.obstacle)
    affines = {path: _affine(network, path) for path in stream.norms}
    features = len(next(iter(affines.values())).gain)
    parameters = dict(network.named_parameters())
    for part in stream.parts:
        if _width(part, parameters) != features:
            raise Obstacle(f"{part.name} does not give {features} features")
    tables = {part.name for part in stream.parts if part.role in ("table", "plain")}
    readers = [r for path in stream.norms for r in dict.fromkeys(structure.norms[path].readers)]
    readers += dict.fromkeys(stream.direct)
    if len(set(readers)) < len(readers):
        raise Obstacle("a layer reads it in two ways")
    if any(part.name in tables for part in stream.direct):
        raise Obstacle("a layer that is tied to an embedding reads it without a norm")
    unfolded: dict[str, bool] = {}
    for path in stream.norms:
        if not _folds(structure, path, affines[path], tables):
            unfolded[path] = any(part.name in tables for part in structure.norms[path].readers)
            if unfolded[path] and structure.norms[path].others:
                raise Obstacle(f"the output of {path} goes to a tied head and elsewhere")
    if len(unfolded) * _NORMS_PER_MATRIX > len(stream.norms):
        names = ", ".join(unfolded)
        raise Obstacle(f"layers cannot absorb the gain of {len(unfolded)} of {len(stream.norms)} norms ({names})")
    return StreamPlan(stream=stream, features=features, affines=affines, unfolded=unfolded)


def _affine(network: nn.Module, path: str) -> Affine:
    affine = affine_of(module_at(network, path))
    if affine is None:
        raise Obstacle(f"{path} computes no norm")
    return affine


def _folds(structure: Structure, path: str, affine: Affine, tables: set[str]) -> bool:
    """Whether gain and shift of a norm can go into the layers that read it."""
    reads = structure.norms[path]
    if reads.others or any(part.name in tables for part in reads.readers):
        return False
    return not affine.has_shift or all(part.bias not in ("", "?") for part in reads.readers)


def _width(part: Part, parameters: _Parameters) -> int:
    return part.stop - part.start if part.role in ("rows", "columns") else parameters[part.name].shape[-1]


@torch.no_grad()
def rotate_stream_(network: nn.Module, structure: Structure, plan: StreamPlan, rotation: Tensor) -> None:
    """Rotate a stream.

    Args:
        network: changed in place; its parameters are its own.
        structure: of the network.
        plan: for the stream.
        rotation: R, float64 `[features, features]`, orthogonal; keeps the vector of ones.

    Raises:
        Obstacle: a norm whose gain cannot be set to 1.
    """
    parameters = dict(network.named_parameters())
    ones = torch.ones(plan.features, dtype=torch.float64, device=rotation.device)
    written = {part.name for part in plan.stream.parts if part.role in ("table", "plain")}
    for part in plan.stream.parts:
        _write_(parameters, part, rotation)
    for part in dict.fromkeys(plan.stream.direct):
        _read_(parameters, part, ones, rotation)
    for path in plan.stream.norms:
        affine, readers = plan.affines[path], dict.fromkeys(structure.norms[path].readers)
        norm = module_at(network, path)
        if path in plan.unfolded:
            _unfold_(network, path, affine, rotation, is_tied=plan.unfolded[path])
            for part in readers if plan.unfolded[path] else ():
                if part.name not in written:
                    _read_(parameters, part, ones, rotation)
        else:
            for part in readers:
                if affine.has_shift:
                    _shift_bias_(parameters, part, affine.shift)
                _read_(parameters, part, affine.gain, rotation)
        if not neutralize_(norm):
            raise Obstacle(f"the gain of {path} cannot be set to 1")


@torch.no_grad()
def rotate_heads_(network: nn.Module, heads: Heads, reader: Part, generator: torch.Generator) -> None:
    """Rotate the values of each head of attention, in the layer that gives them and in the one that reads them.

    Args:
        network: changed in place.
        heads: the values.
        reader: the matrix that reads what attention makes of them; several of its heads may share one head of values.
        generator: draws the rotations.
    """
    parameters = dict(network.named_parameters())
    copies = _inputs(reader, parameters) // (heads.count * heads.width)
    for head in range(heads.count):
        rotation = orthogonal(heads.width, generator).to(parameters[reader.name].device)
        start = heads.part.start + heads.first + head * heads.step
        part = Part(
            name=heads.part.name,
            role=heads.part.role,
            start=start,
            stop=start + heads.width,
            bias=heads.part.bias,
        )
        _write_(parameters, part, rotation)
        first = head * copies * heads.width
        for place in range(first, first + copies * heads.width, heads.width):
            _turn_inputs_(parameters, reader, slice(place, place + heads.width), rotation)


def _inputs(part: Part, parameters: _Parameters) -> int:
    return parameters[part.name].shape[1 if part.role == "rows" else 0]


def _unfold_(network: nn.Module, path: str, affine: Affine, rotation: Tensor, *, is_tied: bool) -> None:
    """Put the gain of a norm, and the way out of the rotation, into a matrix behind it."""
    norm = module_at(network, path)
    like = next(p for p in norm._parameters.values() if p is not None)
    matrix, shift = affine.gain.unsqueeze(1) * rotation, affine.shift
    if is_tied:  # the head reads rotated features
        matrix, shift = rotation.T @ matrix, shift @ rotation
    turned = RotatedNorm(norm, matrix.to(like), shift.to(like))
    swap_(network, path, turned.train(norm.training))


def _write_(parameters: _Parameters, part: Part, rotation: Tensor) -> None:
    """Let a part give rotated outputs."""
    parameter = parameters[part.name]
    if part.role == "rows":
        rows = parameter.data[part.start : part.stop]
        wide = _wide(rows)
        rows.copy_((rotation.T.to(wide) @ wide.flatten(1)).reshape(rows.shape))
    elif part.role == "columns":
        columns = parameter.data[:, part.start : part.stop]
        wide = _wide(columns)
        columns.copy_(wide @ rotation.to(wide))
    else:
        wide = _wide(parameter.data)
        parameter.data.copy_(wide @ rotation.to(wide))
    if part.bias:
        if part.bias not in parameters:
            raise Obstacle(f"the bias of {part.name} is no parameter")
        bias = parameters[part.bias].data[part.start : part.stop]
        wide = _wide(bias)
        bias.copy_(wide @ rotation.to(wide))


def _read_(parameters: _Parameters, part: Part, gain: Tensor, rotation: Tensor) -> None:
    """Let a part read rotated inputs without their gain."""
    matrix = _matrix(parameters, part)
    wide = _wide(matrix)
    matrix.copy_((wide * gain.to(wide)) @ rotation.to(wide))


def _shift_bias_(parameters: _Parameters, part: Part, shift: Tensor) -> None:
    matrix = _wide(_matrix(parameters, part))
    bias = parameters[part.bias].data[part.start : part.stop]
    bias.copy_(_wide(bias) + matrix @ shift.to(matrix))


def _turn_inputs_(parameters: _Parameters, part: Part, inputs: slice, rotation: Tensor) -> None:
    matrix = _matrix(parameters, part)[:, inputs]
    wide = _wide(matrix)
    matrix.copy_(wide @ rotation.to(wide))


def _matrix(parameters: _Parameters, part: Part) -> Tensor:
    """The part `[outputs, inputs]`, a view on the parameter."""
    data = parameters[part.name].data
    return data.T if part.role == "columns" else data[part.start : part.stop]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
