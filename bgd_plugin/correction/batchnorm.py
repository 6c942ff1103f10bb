"""Batch-norm correction: the statistics follow the inputs that a compressed network really sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional

from bgd_plugin.calibration import Rerun, Walk
from bgd_plugin.correction.gain import Gain, output_distance
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import call_input, has_running_statistics, module_at
from bgd_plugin.support.processes import sum_
from bgd_plugin.support.processes import total as sum_of

__all__ = [
    "absorb_row_scale_",
    "correct_batchnorm_",
    "correct_batchnorm_at_",
    "is_batchnorm",
    "is_shared",
    "row_scale_bounds",
]

# How far a correction may move a scale: beyond it, the calibration data says more about itself than about the network.
_SCALE_BOUNDS = (0.05, 20.0)
_JUDGED_BATCHES = 4
"""Batches on which it is told what a correction gained, at most."""


def is_batchnorm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node runs a batch norm that has running statistics."""
    return node.op == "call_module" and has_running_statistics(module_at(graph_module, str(node.target)))


def is_shared(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether other nodes run the same module: statistics that serve several inputs can be matched to none of them."""
    module = module_at(graph_module, str(node.target))
    calls = [n for n in graph_module.graph.nodes if n.op == "call_module"]
    return sum(module_at(graph_module, str(n.target)) is module for n in calls) > 1


@torch.no_grad()
def correct_batchnorm_(
    walk: Walk, node: fx.Node, mode: Literal["matched", "reestimate"], skip: fx.Node | None = None
) -> Gain | None:
    """Correct the statistics of the student's batch norm at `node`; nothing else is touched.

    Returns what that gained, with the skip added where there is one; None where nothing was to be corrected.

    "matched" keeps, for each channel, the mean and the variance that the float network's batch norm gives on the
    calibration data. With input moments (m, v) in the float network and (m', v') in the student, and shipped statistics
    (μ, σ²):

        σ'² = σ² · v' / v        μ' = m' − (m − μ) · σ' / σ

    The shipped statistics, made from a whole training set, stay the reference: only the *change* that compression
    made is carried over. "reestimate" takes m' and v' as they are. Channels that are constant in both networks keep
    their variance.

    Where the norm ends a branch whose other side, `skip`, has drifted, the layer before it was fitted to make good that
    drift as well, and its output rightly varies more than the float network's. "matched" then means the affine map,
    for each channel, that brings the norm's output nearest to (least squares) the float network's output and drift.
    """
    if not walk.differs(call_input(node)):
        return None
    name = str(node.target)
    norm: Any = walk.student.get_submodule(name)
    shipped: Any = walk.reference.get_submodule(name) if walk.reference is not None else None
    before = _distance(walk, node, skip)
    if mode == "matched" and skip is not None:
        found = _nearest(norm, shipped, walk, call_input(node), skip)
    else:
        mine = (walk.student_value(call_input(node), batch) for batch in range(walk.batch_count))
        found = _channel_moments(mine, name)
        if mode == "matched":
            reference = _channel_moments((theirs for _, theirs in walk.pairs(call_input(node))), name)
            found = _matched(norm, shipped, found, reference)
    _set_(norm, found, name)
    return Gain(before=before, after=_distance(walk, node, skip))


@torch.no_grad()
def correct_batchnorm_at_(rerun: Rerun, path: str, mode: Literal["matched", "reestimate"]) -> Gain | None:
    """`correct_batchnorm_` for a batch norm of a network that is not a graph."""
    mine, theirs = rerun.norm_inputs(path)
    if all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True)):
        return None
    norm: Any = module_at(rerun.student, path)
    shipped = module_at(rerun.reference, path)
    judged = list(zip(mine, theirs, strict=True))[:_JUDGED_BATCHES]
    before = output_distance((_normalized(norm, x), _normalized(shipped, y)) for x, y in judged)
    found = _channel_moments(iter(mine), path)
    if mode == "matched":
        found = _matched(norm, shipped, found, _channel_moments(iter(theirs), path))
    _set_(norm, found, path)
    after = output_distance((_normalized(norm, x), _normalized(shipped, y)) for x, y in judged)
    return Gain(before=before, after=after)


@torch.no_grad()
def absorb_row_scale_(norm: Any, scale: Tensor) -> None:
    """Let a batch norm take out a factor on each of its input's channels: its output stays what it was.

    Args:
        norm: the batch norm; its statistics are replaced, its parameters stay.
        scale: `[channels]`, positive.
    """
    scale = scale.to(norm.running_mean.device).double()
    variance = (norm.running_var.double() + norm.eps) * scale.square() - norm.eps
    mean = norm.running_mean.double() * scale
    norm.running_mean, norm.running_var = (t.to(norm.running_mean) for t in (mean, variance))


@torch.no_grad()
def row_scale_bounds(norm: Any) -> tuple[Tensor, Tensor]:
    """The least and the largest factor on each channel, `[channels]`, that `absorb_row_scale_` can take out.

    The variance must stay above eps, since eps is under the same root, and its type must hold the statistics.
    """
    limits = torch.finfo(norm.running_var.dtype)
    sigma = (norm.running_var.double() + norm.eps).sqrt().clamp(min=limits.tiny)
    least = max(2 * norm.eps, limits.tiny) ** 0.5 / sigma
    largest = torch.minimum((limits.max / 4) ** 0.5 / sigma, limits.max / 4 / norm.running_mean.double().abs())
    return torch.minimum(least, largest), largest


def _distance(walk: Walk, node: fx.Node, skip: fx.Node | None) -> float:
    """Of a norm's outputs from the float network's, on the first batches, with what the skip adds; NaN without one."""
    if walk.reference is None:
        return math.nan
    norms = [network.get_submodule(str(node.target)) for network in (walk.student, walk.reference)]

    def judged() -> Iterator[tuple[Tensor, Tensor]]:
        for batch, pair in zip(range(_JUDGED_BATCHES), walk.pairs(call_input(node)), strict=False):
            mine, theirs = map(_normalized, norms, pair)
            yield (mine if skip is None else mine - walk.drift(skip, batch)), theirs

    return output_distance(judged())


def _normalized(norm: Any, value: Tensor) -> Tensor:
    """What the norm makes of its input by its statistics. The module itself is not run: hooks of the user's see
    calibration once.
    """
    mean, variance = norm.running_mean, norm.running_var
    return functional.batch_norm(value.to(mean), mean, variance, norm.weight, norm.bias, eps=norm.eps)


def _matched(
    norm: Any, shipped: Any, student: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Statistics with which the student's output keeps the mean and variance of the reference's, by channel.

    eps stands under the same root as the variance, so σ² means variance + eps here; the student's own σ bounds the
    move.
    """
    tiny = 1e-3 * norm.eps
    low, high = _SCALE_BOUNDS
    sigma = (shipped.running_var.double() + shipped.eps).sqrt()
    own = (norm.running_var.double() + norm.eps).sqrt()
    wanted = sigma * ((student[1] + tiny) / (reference[1] + tiny)).sqrt()
    wanted = wanted.clamp(min=low * own, max=high * own)
    mean = student[0] - (reference[0] - shipped.running_mean.double()) * wanted / sigma
    return mean, (wanted.square() - norm.eps).clamp(min=0)


def _nearest(norm: Any, shipped: Any, walk: Walk, before: fx.Node, skip: fx.Node) -> tuple[Tensor, Tensor]:
    """Statistics with which the student's output is nearest to the reference's plus what the skip has lost.

    In the batch norm's output: γ(z − μ')/σ' + β ≈ γ(y − μ)/σ + β + drift. So with t = y + drift · σ/γ, and s and o the
    least squares of s z + o ≈ t: σ' = σ/s, μ' = (μ − o)/s.
    """
    sigma = (shipped.running_var.double() + shipped.eps).sqrt()
    gain = (1.0 if norm.weight is None else norm.weight.detach().double()) / sigma
    inverse = gain / (gain.square() + 0.01 * gain.square().mean()).clamp(min=1e-300)
    count, sums = 0, torch.zeros(4, len(sigma), dtype=torch.float64, device=sigma.device)
    for batch in range(walk.batch_count):
        z = _channels(walk.student_value(before, batch)).double()
        t = _channels(walk.reference_value(before, batch)).double()
        t = t + _channels(walk.drift(skip, batch)).double() * inverse[:, None]
        count += z.shape[1]
        sums += torch.stack([z.sum(1), t.sum(1), z.square().sum(1), (z * t).sum(1)])
    sum_([sums])
    z_mean, t_mean, z_square, product = sums / sum_of(count)
    slope = (product - z_mean * t_mean) / (z_square - z_mean.square()).clamp(min=1e-300)
    own = (norm.running_var.double() + norm.eps).sqrt()
    low, high = _SCALE_BOUNDS
    wanted = (sigma / slope.clamp(min=1e-300)).clamp(min=low * own, max=high * own)
    ratio = wanted / sigma  # 1 / slope, but for the bounds
    mean = ratio * (shipped.running_mean.double() - t_mean) + z_mean
    return mean, (wanted.square() - norm.eps).clamp(min=0)


def _set_(norm: Any, statistics: Sequence[Tensor], name: str) -> None:
    """Give a batch norm its statistics: new tensors, not new values, since the reference may share the old ones."""
    statistics = [t.to(norm.running_mean) for t in statistics]
    _require_finite(statistics, name)
    norm.running_mean, norm.running_var = statistics


def _require_finite(moments: Sequence[Tensor], name: str) -> None:
    if not all(bool(torch.isfinite(moment).all()) for moment in moments):
        raise CalibrationError(
            f"batch norm {name!r}: its inputs on the calibration data hold NaN or infinite values, or overflow; "
            "check the data and the layers before it"
        )


def _channels(value: Tensor) -> Tensor:
    """`[batch, channels, ...]` as `[channels, positions]`, in single precision."""
    return value.transpose(0, 1).flatten(1).float()


def _channel_moments(values: Iterator[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Mean and variance over batch and positions of `[batch, channels, ...]` values, summed in double precision.

    Raises:
        CalibrationError: they are not finite; the batch norm of that name has these values as its inputs.
    """
    count = 0
    total, squares = torch.zeros(()), torch.zeros(())
    for value in values:
        x = _channels(value)
        count += x.shape[1]
        center = x.mean(dim=1)
        total = total + x.shape[1] * center.double()
        squares = squares + ((x - center[:, None]).square().sum(dim=1)).double() + x.shape[1] * center.double().square()
    sum_([total, squares])
    _require_finite([total, squares], name)
    count = int(sum_of(count))
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)
