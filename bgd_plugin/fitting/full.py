"""Beyond the paper: the whole Gram of a layer's inputs, and the float network's outputs as the aim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration import PooledGram, paired_rows, pooled_gram
from bgd_plugin.fitting import em
from bgd_plugin.fitting.base import FittedLayer, LayerContext, Method
from bgd_plugin.nn import storable
from bgd_plugin.pq.full import fit_full
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.target import Moments, asymmetric_target, matching_bias

__all__ = ["FULL"]

_MAX_COLUMNS = 8192
_MIN_ROWS = 32768
_ROWS_PER_COLUMN = 8
_DAMPING = 0.2  # in units of the Gram's mean diagonal; twice as much where there are as many columns as rows
_HELDOUT = 5  # one row in so many judges the fit


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Second moments of the rows that the fit sees, of those that judge it, and of both."""

    fitted: Moments
    heldout: Moments
    everything: Moments
    rows: int


def _collect(context: LayerContext, generator: torch.Generator) -> _Statistics | PooledGram:
    columns = context.weight[0].numel()
    if columns > _MAX_COLUMNS:
        return pooled_gram(context.inputs, context.layer.block_size)
    rows = paired_rows(context.inputs, max(_MIN_ROWS, _ROWS_PER_COLUMN * columns), generator)
    groups = rows.student.shape[0]
    outputs = rows.reference @ context.weight.detach().float().reshape(groups, -1, columns).mT
    count = rows.student.shape[1]
    cut = count - count // _HELDOUT
    fitted = Moments.of(rows.student[:, :cut], outputs[:, :cut])
    if cut == count:
        return _Statistics(fitted=fitted, heldout=fitted, everything=fitted, rows=count)
    heldout = Moments.of(rows.student[:, cut:], outputs[:, cut:])
    return _Statistics(fitted=fitted, heldout=heldout, everything=_pooled(fitted, heldout, cut / count), rows=count)


def _pooled(first: Moments, second: Moments, share: float) -> Moments:
    """The moments of two sets of rows together, `share` of them in the first."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return share * a + (1 - share) * b

    return Moments(
        gram=mean(first.gram, second.gram),
        mean=mean(first.mean, second.mean),
        cross=mean(first.cross, second.cross),
        output_mean=mean(first.output_mean, second.output_mean),
    )


def _solve(context: LayerContext, statistics: _Statistics | PooledGram, generator: torch.Generator) -> FittedLayer:
    if isinstance(statistics, PooledGram):
        pooled = em.EM.solve(context, statistics, generator)
        note = f"{context.weight[0].numel()} columns: fitted to the pooled Gram of its blocks"
        return FittedLayer(codebook=pooled.codebook, codes=pooled.codes, note=note)
    weight = context.weight.detach().float().flatten(1)
    takes_mean = context.has_batchnorm or context.has_bias
    damping = min(1.0, _DAMPING * (1 + weight.shape[1] / statistics.rows))
    step = context.config.asymmetric_step
    target = asymmetric_target(weight, statistics.everything, step=step, damping=damping) if step else weight
    scale = _row_scale(target, statistics.everything) if context.has_batchnorm and not context.has_bias else None
    rows = target if scale is None else target * scale[:, None]
    fit = fit_full(
        rows,
        _gram(statistics.fitted, centred=takes_mean),
        _gram(statistics.heldout, centred=takes_mean),
        context.layer.codebook_size,
        context.layer.block_size,
        damping=damping,
        rounds=context.config.rounds,
        mask=None if context.mask is None else context.mask.flatten(1),
        generator=generator,
    )
    codebook = storable(fit.codebook)
    shift = None
    if context.has_bias and not context.has_batchnorm:
        decoded = masked(torch.nn.functional.embedding(fit.codes, codebook).reshape(weight.shape), context.mask)
        shift = matching_bias(decoded, statistics.everything)
    return FittedLayer(codebook=codebook.to(context.weight.dtype), codes=fit.codes, row_scale=scale, bias_shift=shift)


def _gram(moments: Moments, *, centred: bool) -> Tensor:
    return moments.centred()[0] if centred else moments.gram


def _row_scale(target: Tensor, moments: Moments) -> Tensor:
    """One over the standard deviation of each row's output: every row's error then counts the same; `[rows]`."""
    covariance = moments.centred()[0]
    rows = target.double().reshape(covariance.shape[0], -1, covariance.shape[1])
    deviation = ((rows @ covariance) * rows).sum(2).clamp(min=0).sqrt().flatten()
    alive = deviation > 1e-3 * deviation.mean()
    return torch.where(alive, deviation, deviation.mean().clamp(min=1e-12)).reciprocal().float()


FULL = Method(collect=_collect, solve=_solve)
