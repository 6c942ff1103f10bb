"""The default method: fit to the whole Gram of a layer's inputs, with the float network's outputs as the target."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from bgd_plugin.calibration import PooledGram, paired_pieces, pooled_gram, require_finite
from bgd_plugin.fitting import method_em
from bgd_plugin.fitting.entropy_coded import fit_stream
from bgd_plugin.fitting.exact import exact_fit
from bgd_plugin.fitting.method import FittedLayer, LayerContext, Method
from bgd_plugin.fitting.row_scales_and_bias_shift import equal_rows, matching_bias
from bgd_plugin.fitting.target_residual import relative_weights, sum_behind, with_drift
from bgd_plugin.fitting.trellis_windows import fit_windows
from bgd_plugin.nn import storable
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.pq.full_gram import fit_full
from bgd_plugin.pq.gram import Moments, MomentSums
from bgd_plugin.pq.maps import Maps
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.target_asymmetric import asymmetric_target, best_step, ridge_change
from bgd_plugin.support.seeds import seeded

__all__ = ["FULL"]

_MAX_COLUMNS = 8192
_MIN_ROWS = 8192
_ROWS_PER_COLUMN = 64, 8
"""Up to 32,768 rows so many for each column, and so many beyond."""
_MANY_ROWS = 32768
_DAMPING = 0.2  # in units of the Gram's mean diagonal; twice as much where there are as many columns as rows
_ENOUGH_ROWS = 2
"""Rows for each column from which on what a target corrects is not mostly noise."""
_HELDOUT = 5  # every fifth row is held out


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Moments of the fitted rows and of the held-out rows, and the share of the fitted ones."""

    fitted: Moments
    heldout: Moments
    share: float
    rows: float


def _collect(context: LayerContext, generator: torch.Generator) -> _Statistics | PooledGram:
    columns = context.weight[0].numel()
    if columns > _MAX_COLUMNS:
        return pooled_gram(context.inputs, context.layer.block_size)
    shared = context.inputs.shared
    if shared is None:
        return _gathered(context, context.rows, generator)
    if shared.statistics is None:  # the same rows, whichever of the layers is fitted first
        generator = seeded(context.config.seed, f"{shared.name} inputs")
        shared.statistics = _gathered(context, None, generator)
    return _through(shared.statistics, context.rows)


def _gathered(context: LayerContext, weight: Tensor | None, generator: torch.Generator) -> _Statistics:
    """Moments of the inputs and of the float network's outputs; without a weight, of the float network's inputs."""
    fitted, heldout = MomentSums(), MomentSums()
    columns = context.weight[0].numel()
    drift, stream = (None, None) if context.skip is None else (context.skip.drift, context.skip.stream)
    known = None if weight is None else context.inputs.outputs
    for piece in paired_pieces(context.inputs, _rows_of(columns), generator, drift, stream, known):
        outputs = piece.reference
        if weight is not None and known is None:
            outputs = outputs @ weight.reshape(len(outputs), -1, columns).mT
        weights = None if piece.stream is None else relative_weights(sum_behind(outputs, piece.stream))
        if context.skip is not None:
            assert piece.drift is not None
            outputs = with_drift(outputs, piece.drift, context.skip.gain)
        cut = _rows_to_fit(outputs.shape[1], piece.index, piece.pieces)
        if isinstance(piece.inputs, Maps) and cut in (0, outputs.shape[1]):
            mine, other = (fitted, heldout) if cut else (heldout, fitted)
            mine.add_maps_(piece.inputs, outputs)
            other.add_(outputs.new_empty(1, 0, columns), outputs[:, :0])  # processes share sums of nothing, too
            continue
        first, last = (None, None) if weights is None else (weights[:cut], weights[cut:])
        fitted.add_(piece.student[:, :cut], outputs[:, :cut], first)
        heldout.add_(piece.student[:, cut:], outputs[:, cut:], last)
    for sums in (fitted, heldout):
        sums.share_()
        for moment in sums.squares:
            require_finite(moment, context.inputs.name)
    rows = fitted.count + heldout.count
    return _Statistics(fitted=fitted.means_(), heldout=heldout.means_(), share=fitted.count / rows, rows=rows)


def _rows_of(columns: int) -> int:
    """How many rows of inputs a layer of so many columns is fitted to, held-out ones included."""
    plenty, enough = _ROWS_PER_COLUMN
    return max(_MIN_ROWS, min(_MANY_ROWS, plenty * columns), enough * columns)


def _through(statistics: _Statistics, weight: Tensor) -> _Statistics:
    """The statistics of a layer, from those of the float network's inputs in place of its outputs."""
    fitted, heldout = (moments.through(weight) for moments in (statistics.fitted, statistics.heldout))
    return dataclasses.replace(statistics, fitted=fitted, heldout=heldout)


def _rows_to_fit(rows: int, index: int, pieces: int) -> int:
    """How many rows of a piece are fitted: all of the first pieces', none of the last ones'."""
    share = (_HELDOUT - 1) * pieces - _HELDOUT * index  # in parts of 1 / _HELDOUT
    return max(0, min(rows, -(-share * rows // _HELDOUT)))


def _solve(context: LayerContext, statistics: _Statistics | PooledGram, generator: torch.Generator) -> FittedLayer:
    if isinstance(statistics, PooledGram):
        pooled = method_em.EM.solve(context, statistics, generator)
        note = f"{context.weight[0].numel()} columns: too wide for a full Gram, fitted to the pooled Gram of its blocks"
        return dataclasses.replace(pooled, warnings=(note, *pooled.warnings))
    exact = exact_fit(context.weight, context.layer)
    if exact is not None:
        return _with_shift(context, statistics, exact)
    weight = context.rows
    damping = min(1.0, _DAMPING * (1 + weight.shape[1] / statistics.rows))
    aim = _aim(context, statistics, damping)
    if context.layer.codes == TRELLIS:
        fit = _fitted_windows(context, statistics, aim)
    elif context.layer.codes == "entropy":
        everything = Moments.pooled(statistics.fitted, statistics.heldout, statistics.share)
        fit = fit_stream(aim.rows, _second(context, everything)[0], context.layer, damping=damping)
    else:
        fit = _fitted_blocks(context, statistics, aim, damping, generator)
    codebook = fit.codebook
    shift = None
    if context.has_bias and not context.has_batchnorm:
        decoded = masked(fit.decoded(weight.shape), context.mask)
        shift = matching_bias(decoded, aim.mean, aim.output_mean)
    codebook = codebook.to(context.weight.dtype)
    return dataclasses.replace(fit, codebook=codebook, row_scale=aim.row_scale, bias_shift=shift)


def _fitted_windows(context: LayerContext, statistics: _Statistics, aim: _Aim) -> FittedLayer:
    """Trellis codes, fitted to all inputs once it is known how strongly to damp."""
    everything = Moments.pooled(statistics.fitted, statistics.heldout, statistics.share)
    grams = [_second(context, m)[0] for m in (everything, statistics.fitted, statistics.heldout)]
    judged = {"fitted": grams[1], "heldout": grams[2]} if statistics.share < 1 else {}
    mask = None if context.mask is None else context.mask.flatten(1)
    return fit_windows(aim.rows, grams[0], mask=mask, **judged)


def _fitted_blocks(
    context: LayerContext, statistics: _Statistics, aim: _Aim, damping: float, generator: torch.Generator
) -> FittedLayer:
    """Codes of blocks, and a codebook in single precision."""
    gram, heldout = (_second(context, m)[0] for m in (statistics.fitted, statistics.heldout))
    fit = fit_full(
        aim.rows,
        gram,
        heldout if statistics.share < 1 else gram,
        context.layer.codebook_size,
        context.layer.block_size,
        damping=damping,
        rounds=context.config.rounds,
        mask=None if context.mask is None else context.mask.flatten(1),
        generator=generator,
    )
    codebook = storable(fit.codebook, context.layer.codebook_storage)
    return FittedLayer(codebook=codebook, codes=fit.codes, warnings=fit.notes)


def _with_shift(context: LayerContext, statistics: _Statistics, fit: FittedLayer) -> FittedLayer:
    """An exact fit, whose bias makes good what the means of its inputs have drifted."""
    if not context.has_bias or context.has_batchnorm:
        return fit
    moments = Moments.pooled(statistics.fitted, statistics.heldout, statistics.share)
    decoded = fit.decoded(context.weight.shape).flatten(1)
    shift = matching_bias(decoded.float(), moments.mean, moments.output_mean)
    return dataclasses.replace(fit, bias_shift=shift)


@dataclass(frozen=True, kw_only=True)
class _Aim:
    """The weight to quantize, `[rows, columns]`, the factor on each of its rows, and the means of `Moments`."""

    rows: Tensor
    row_scale: Tensor | None
    mean: Tensor
    output_mean: Tensor


def _aim(context: LayerContext, statistics: _Statistics, damping: float) -> _Aim:
    step = _step(context, statistics, damping)  # first, while no more Grams are held
    everything = Moments.pooled(statistics.fitted, statistics.heldout, statistics.share)
    gram, cross = _second(context, everything)
    rows, scale = context.rows, None
    if step:
        rows = asymmetric_target(rows, gram, cross, step=step, damping=damping)
    if context.has_batchnorm and not context.has_bias:
        scale = equal_rows(rows, gram, context)
        rows = rows * scale[:, None]
    return _Aim(rows=rows, row_scale=scale, mean=everything.mean, output_mean=everything.output_mean)


def _step(context: LayerContext, statistics: _Statistics, damping: float) -> float:
    """How far to aim at the float network's outputs: not beyond where the error on held-out rows is least."""
    step, columns = context.config.asymmetric_step, context.rows.shape[1]
    if not step or statistics.share in (0.0, 1.0) or statistics.rows >= _ENOUGH_ROWS * columns:
        return step
    change = ridge_change(context.rows, *_second(context, statistics.fitted), damping=damping)
    return min(step, best_step(context.rows, change, *_second(context, statistics.heldout)))


def _second(context: LayerContext, moments: Moments) -> tuple[Tensor, Tensor]:
    """Second moments of inputs, and of inputs and outputs, as `Moments` has them: around what nothing else fits."""
    return moments.around_mean() if context.takes_mean else moments.around_zero()


FULL = Method(collect=_collect, solve=_solve)
