"""Fit trellis windows (`pq.windows`) to a weight: a scale for each row, then column after column with error feedback.

The order of the columns is free, since nothing of it is stored: those with the largest inputs come first, so that all
others can compensate for their errors. How strongly the Gram is damped is chosen on held-out inputs, with some rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from bgd_plugin.fitting.method import FittedLayer
from bgd_plugin.kernels.viterbi import walk_search
from bgd_plugin.nn import storable
from bgd_plugin.pq.feedback import damped, factors, grouped
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.pq.masked import masked
from bgd_plugin.pq.panels import Panels
from bgd_plugin.pq.powers import near_one, power_of_two
from bgd_plugin.pq.viterbi import nearest_ring
from bgd_plugin.pq.windows import packed_states, padded_rows, window_table

__all__ = ["fit_windows"]

_DAMPINGS = (0.03, 0.25)
_DAMPING = 0.08
_TRIAL_ROWS = 48
_LEAST_SCALE = 1e-30
_COLUMNS = 64
"""Columns whose weights are computed at once."""


@torch.no_grad()
def fit_windows(
    weight: Tensor,
    gram: Tensor | None,
    *,
    fitted: Tensor | None = None,
    heldout: Tensor | None = None,
    mask: Tensor | None = None,
) -> FittedLayer:
    """Minimize Σ_groups tr((W − Ŵ) H (W − Ŵ)ᵀ) over row scales in half precision and codes.

    Args:
        weight: `[rows, columns]`, the rows of each group contiguous.
        gram: H, second moments of all inputs, `[groups, columns, columns]`; None: the identity.
        fitted, heldout: second moments of the inputs that are fitted and of those that judge, to choose the damping,
            `[groups, columns, columns]` each; None: it is not chosen.
        mask: bool `[rows, columns]`, false where the decoded weight is zero; None: nowhere.

    Raises:
        ValueError: NaN or Inf.
    """
    for values in (weight, gram):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError("the weights or the inputs hold NaN or Inf")
    rows, unit = near_one(weight.float())
    gram = torch.eye(rows.shape[1], device=rows.device)[None] if gram is None else gram
    damping = _DAMPING
    if fitted is not None and heldout is not None:
        damping = _best_damping(rows, mask, fitted, heldout)
    task = _Task.of(rows, gram, mask, [damping])
    states = task.encoded(is_ring=True)
    scale = task.solved_scale(states) * unit
    return FittedLayer(
        codebook=storable(scale).to(weight.dtype),
        codes=packed_states(states).to(weight.device),
        form=TRELLIS,
    )


def _best_damping(rows: Tensor, mask: Tensor | None, fitted: Tensor, heldout: Tensor) -> float:
    """The damping with which some of the rows have the least error on held-out inputs."""
    groups = len(fitted)
    step = max(1, len(rows) // groups // max(1, -(-_TRIAL_ROWS // groups)))

    def some(values: Tensor) -> Tensor:
        return values.reshape(groups, -1, values.shape[1])[:, ::step].flatten(0, 1)

    part, kept = some(rows), None if mask is None else some(mask)

    task = _Task.of(part, fitted, kept, _DAMPINGS)
    states = task.encoded(is_ring=False)
    found = (task.decoded(states) * task.solved_scale(states)[:, None]).view(len(_DAMPINGS), *part.shape)
    losses = []
    for decoded in found:
        away, grams = grouped(part - decoded, heldout)
        losses.append(float(((away @ grams.float()) * away).sum()))
    return _DAMPINGS[losses.index(min(losses))]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Rows to encode, with columns in the order in which they are.

    Attributes:
        rows: `[groups, rows_per_group, columns]`.
        mask: bool, of the same shape, or None.
        scale: of each row, `[groups, rows_per_group]`, in half precision's values.
        hessian: the damped Gram, `[groups, columns, columns]`.
        metrics, inverse: its factors (`pq.feedback`).
        order: which column of the layer each one is.
    """

    rows: Tensor
    mask: Tensor | None
    scale: Tensor
    hessian: Tensor
    metrics: Tensor
    inverse: Tensor
    order: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, mask: Tensor | None, dampings: Sequence[float]) -> _Task:
        """Of a weight `[rows, columns]` and a Gram `[groups, columns, columns]`, once for each damping.

        Args:
            weight, gram: as given to `fit_windows`.
            mask: bool of the weight's shape, or None.
            dampings: in units of the Gram's mean. All rows and groups are there for the first one, then for the next.
        """
        count = len(dampings)
        rows, grams = grouped(weight, gram)
        rows, mask = rows.repeat(count, 1, 1), None if mask is None else mask.repeat(count, 1)
        hessian = torch.cat([damped(grams, damping) for damping in dampings])
        hessian /= power_of_two(hessian)
        order = hessian.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True, stable=True)
        hessian = hessian[:, order][:, :, order]
        metrics, inverse = factors(hessian.clone(), 1)
        kept = None if mask is None else mask.reshape(rows.shape)[:, :, order]
        counted = rows.shape[2] if mask is None else mask.reshape(rows.shape).sum(2).clamp(min=1)
        power = masked(rows, None if mask is None else mask.reshape(rows.shape)).square().sum(2) / counted
        return cls(
            rows=rows[:, :, order],
            mask=kept,
            scale=power.sqrt().half().float(),
            hessian=hessian.float(),
            metrics=metrics.flatten(1).float(),
            inverse=inverse.float(),
            order=order,
        )

    def encoded(self, *, is_ring: bool) -> Tensor:
        """The states of the layer's columns, int16 `[columns, padded rows]`; not as rings: as many as rows."""
        groups, per_group, columns = self.rows.shape
        count = groups * per_group
        size = padded_rows(count) if is_ring else count
        rest, search = Panels(self.rows.clone(), self.inverse, 1), walk_search()
        table = window_table()
        # a row whose weights are all masked has no scale, whatever it aims at
        inverse_scale = torch.where(self.scale > 0, self.scale.reciprocal(), 0.0)
        states = torch.empty(columns, size, dtype=torch.int16)
        for column, weights in enumerate(self._weights(size)):
            kept = None if self.mask is None else self.mask[:, :, column]
            here = rest[column][:, :, 0]
            values = _padded((here * inverse_scale).flatten(), size).numpy(), weights, table.numpy()
            walk = nearest_ring(search, *values) if is_ring else search(*values, None)
            states[self.order[column]] = own = torch.from_numpy(walk)
            found = table[own[:count].long()].to(here.device).view(groups, per_group) * self.scale
            error = here - masked(found, kept)
            rest.change_(column, (error * self.metrics[:, column, None]).unsqueeze(2))
        return states

    def _weights(self, size: int) -> Iterator[numpy.ndarray[tuple[int], numpy.dtype[numpy.float32]]]:
        """What the squared errors of each column count, relative to their mean, `[size]`, padded by zeros."""
        for start in range(0, self.rows.shape[2], _COLUMNS):
            metrics = self.metrics[:, start : start + _COLUMNS].T[:, :, None]
            kept = None if self.mask is None else self.mask[:, :, start : start + _COLUMNS].permute(2, 0, 1)
            weights = masked((self.scale * metrics).square(), kept).flatten(1)
            weights = weights / weights.mean(1, keepdim=True).clamp(min=_LEAST_SCALE)
            yield from _padded(weights, size).numpy()

    def decoded(self, states: Tensor) -> Tensor:
        """The values of the table, without scales and zero where masked, `[rows, columns]`, columns as in the layer."""
        groups, per_group, _ = self.rows.shape
        values = window_table()[states[:, : groups * per_group].long()].T.to(self.rows.device)
        if self.mask is None:
            return values
        mask = torch.empty_like(self.mask)
        mask[:, :, self.order] = self.mask
        return masked(values, mask.reshape(values.shape))

    def solved_scale(self, states: Tensor) -> Tensor:
        """The scale of each row by least squares, `[rows]`; where all values are zero, the one that it had."""
        values = self.decoded(states)[:, self.order].view(self.rows.shape)
        weighted = values @ self.hessian
        power = (weighted * values).sum(2)
        return torch.where(power > 0, (weighted * self.rows).sum(2) / power, self.scale).flatten()


def _padded(values: Tensor, size: int) -> Tensor:
    """Float32 on a CPU, filled up with zeros to this size of the last dimension."""
    return torch.nn.functional.pad(values.cpu(), (0, size - values.shape[-1]))
