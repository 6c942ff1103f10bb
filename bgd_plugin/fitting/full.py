"""Beyond the paper: the whole Gram of a layer's inputs, and the float network's outputs as the aim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration import PooledGram, paired_pieces, pooled_gram
from bgd_plugin.fitting import em
from bgd_plugin.fitting.base import FittedLayer, LayerContext, Method
from bgd_plugin.nn import storable
from bgd_plugin.pq.full import fit_full
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.target import Moments, MomentSums, asymmetric_target, matching_bias

__all__ = ["FULL"]

_MAX_COLUMNS = 8192
_MIN_ROWS = 32768
_ROWS_PER_COLUMN = 8
_DAMPING = 0.2  # in units of the Gram's mean diagonal; twice as much where there are as many columns as rows
_LEAST_GAIN = 0.01  # of the mean square
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
    weight = context.weight.detach().float()
    fitted, heldout = MomentSums(), MomentSums()
    drift = None if context.skip is None else context.skip.drift
    pieces = paired_pieces(context.inputs, max(_MIN_ROWS, _ROWS_PER_COLUMN * columns), generator, drift)
    for piece in pieces:
        outputs = piece.reference @ weight.reshape(len(piece.reference), -1, columns).mT
        if context.skip is not None and piece.drift is not None:
            wanted = piece.drift * _inverse(context.skip.gain.float())
            outputs = outputs + wanted.reshape(len(wanted), len(outputs), -1).transpose(0, 1)
        cut = _rows_to_fit(piece.student.shape[1], piece.index, piece.pieces)
        fitted.add_(piece.student[:, :cut], outputs[:, :cut])
        heldout.add_(piece.student[:, cut:], outputs[:, cut:])
    fitted.share_()
    heldout.share_()
    return _statistics(fitted, heldout)


def _rows_to_fit(rows: int, index: int, pieces: int) -> int:
    """How many of a piece's rows the fit sees: all of the first pieces', none of the last ones'."""
    share = (_HELDOUT - 1) * pieces - _HELDOUT * index  # in parts of 1 / _HELDOUT
    return max(0, min(rows, -(-share * rows // _HELDOUT)))


def _inverse(gain: Tensor) -> Tensor:
    """One over the gain of each channel; channels with next to none are not asked for what they cannot give."""
    floor = _LEAST_GAIN * gain.square().mean()
    return gain / (gain.square() + floor).clamp(min=torch.finfo(gain.dtype).tiny)


def _statistics(fitted: MomentSums, heldout: MomentSums) -> _Statistics:
    rows = fitted.count + heldout.count
    share = fitted.count / rows
    first = fitted.means_()
    if share == 1:
        return _Statistics(fitted=first, heldout=first, everything=first, rows=rows)
    second = heldout.means_()
    return _Statistics(fitted=first, heldout=second, everything=Moments.pooled(first, second, share), rows=rows)


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
    codebook = storable(fit.codebook, context.layer.codebook_storage)
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
