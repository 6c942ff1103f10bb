"""Rotate what can be rotated of a network: proposed from one run, applied to a copy, and kept if the answers agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bgd_plugin.calibration import Batch, answers_differ
from bgd_plugin.graph import copy_module, set_modes
from bgd_plugin.nn import RotatedNorm
from bgd_plugin.rotation.flow import structure_of
from bgd_plugin.rotation.fold import Obstacle, rotate_heads_, rotate_stream_, stream_plan
from bgd_plugin.rotation.matrices import orthogonal
from bgd_plugin.rotation.norms import affine_of, may_be_norm
from bgd_plugin.rotation.structure import Heads, Part, Structure
from bgd_plugin.support.seeds import seeded

__all__ = ["Rotated", "rotated"]

_CHECKED = 2
"""Batches on which the rotated network is compared with the original."""


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """What came of it.

    Attributes:
        network: the rotated network, a copy of the same class; None where nothing was rotated.
        note: what was rotated, or why not, in words; empty where there is no residual stream.
    """

    network: nn.Module | None
    note: str


@torch.no_grad()
def rotated(model: nn.Module, batches: Sequence[Batch], seed: int) -> Rotated:
    """A network that computes the same, with its residual streams and the values of attention in random bases.

    Weights in a random basis are near Gaussian, without the few large columns that cost a quantizer most. All layers
    stay of their kind; a norm before a tied head becomes a `RotatedNorm`.

    Args:
        model: float; left as it is.
        batches: calibration data; one batch shows the structure, and two are compared.
        seed: of the rotations.
    """
    try:
        network: nn.Module = copy_module(model)
        set_modes(network, {"": False})
        norms = _norms(network)
        structure = structure_of(network, batches[0], norms) if norms else Structure()
    except Exception as error:  # running a network runs its own code, under conditions that it may not expect
        return Rotated(network=None, note=f"rotation: none, since the network could not be followed ({error})")
    if not structure.streams() and not structure.heads:
        return Rotated(network=None, note="")
    why = ""
    for with_heads in (True, False):
        turned = copy_module(model)
        set_modes(turned, {"": False})
        try:
            note = _rotate_(turned, structure, seed, with_heads=with_heads)
            why = answers_differ(turned, network, [batches[i] for i in range(min(_CHECKED, len(batches)))])
        except Obstacle as obstacle:
            return Rotated(network=None, note=f"rotation: none, since {obstacle}")
        if not why:
            for module in turned.modules():
                if isinstance(module, RotatedNorm):  # only now: rounding would show in the comparison
                    module.round_()
            set_modes(turned, {path: module.training for path, module in model.named_modules()})
            return Rotated(network=turned, note=note)
    return Rotated(network=None, note=f"rotation: none, since the rotated network answers differently: {why}")


def _norms(network: nn.Module) -> list[str]:
    return [p for p, m in network.named_modules() if p and may_be_norm(m) and affine_of(m) is not None]


def _rotate_(network: nn.Module, structure: Structure, seed: int, *, with_heads: bool) -> str:
    """Rotate all that can be; returns what that was.

    Raises:
        Obstacle: no stream can be rotated.
    """
    device = next(network.parameters()).device
    said, obstacles = [], []
    for stream in structure.streams():
        try:
            plan = stream_plan(network, structure, stream)
        except Obstacle as obstacle:
            obstacles.append(str(obstacle))
            continue
        rotation = orthogonal(plan.features, seeded(seed, f"rotation {stream.norms[0]}"), fixes_mean=True)
        rotate_stream_(network, structure, plan, rotation.to(device))
        said.append(f"a residual stream of {plan.features} features with {len(stream.norms)} norms")
    pairs = _pairs(structure, network) if with_heads else {}
    if not said and not pairs:
        raise Obstacle("; ".join(obstacles) or "no layer could absorb one")
    for heads, reader in pairs.items():
        rotate_heads_(network, heads, reader, seeded(seed, f"rotation {heads.part.name}"))
    if pairs:
        said.append(f"the values of {len(pairs)} attention layers")
    return f"rotation: {' and '.join(said)}, folded into the weights"


def _pairs(structure: Structure, network: nn.Module) -> dict[Heads, Part]:
    """The values of attention that one matrix reads alone."""
    parameters = dict(network.named_parameters())
    inputs = {r: parameters[r.name].shape[1 if r.role == "rows" else 0] for _, r in structure.heads}
    found = [(_fitting(heads, inputs[reader]), reader) for heads, reader in dict.fromkeys(structure.heads)]
    givers, readers = [heads.part for heads, _ in found], [reader for _, reader in found]
    streams = {part for stream in structure.streams() for part in stream.parts}
    return {
        heads: reader
        for heads, reader in found
        if givers.count(heads.part) == 1
        and readers.count(reader) == 1
        and heads.part not in streams
        and inputs[reader] % (heads.count * heads.width) == 0
    }


def _fitting(heads: Heads, inputs: int) -> Heads:
    """Where one layer gives queries, keys and values, and a copy hides which is which: the values are the last third.

    The comparison of the answers shows whether they are.
    """
    if heads.count * heads.width != 3 * inputs:
        return heads
    return dataclasses.replace(heads, first=2 * inputs, step=heads.width, count=inputs // heads.width)
