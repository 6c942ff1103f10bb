"""Trellis-coded quantization with error feedback: each row's cheapest walk, in error and bits, by Viterbi's search.

The levels are a grid of which every other one belongs to one of two quantizers, and the codes before say which of the
two is in force (`encoding.tables`). All rows are searched side by side; each of a row's eight survivors carries its own
rest of the row, from which its errors so far are taken as in `pq.feedback`.

**Source**: Marcellin and Fischer, IEEE Trans. Commun. 38 (1990); rate in the search as in Fischer and Wang, IEEE Trans.
Inf. Theory 38 (1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.encoding.tables import NEXT_STATE, STATES

__all__ = ["encode_trellis"]

_COLUMNS = 64
"""Columns after which each row goes on from its best survivor alone."""
_PART = 16
"""Columns after which the survivors' rests are copied without those that are done."""
_ROWS = 1024
"""Rows that are searched side by side."""
_CLASSES = 4
_NEIGHBOURS = (0, -1, 1)

# A path into a state comes from one of two states, by a code of one of two kinds.
_INTO = [[(s, kind) for s in range(STATES) for kind in (0, 1) if NEXT_STATE[s, kind] == t] for t in range(STATES)]


@torch.no_grad()
def encode_trellis(
    weight: Tensor, levels: Tensor, offset: int, costs: Tensor, metrics: Tensor, inverse: Tensor | None
) -> Tensor:
    """The codes of each row that minimize its weighted squared error plus the costs of its codes.

    Args:
        weight: `[groups, rows, columns]`.
        levels: `[size]`, in the order of the grid.
        offset: of the first level's place in the trellis' grid, 0 to 3.
        costs: `[size]`, what each code costs, in units of the error.
        metrics: `[groups, columns]`, the diagonal of V, H = V Vᵀ: an error of a column counts its square.
        inverse: `[groups, columns, columns]`, V⁻¹; None: no feedback.

    Returns:
        int64 `[groups, rows, columns]`.
    """
    search = _Search(levels, offset, costs)
    parts = [search.codes(rows, metrics, inverse) for rows in torch.split(weight, _ROWS, dim=1)]
    return torch.cat(parts, dim=1)


class _Search:
    """The search with some levels; a code's class is its place in the grid modulo 4: quantizer, then kind."""

    def __init__(self, levels: Tensor, offset: int, costs: Tensor) -> None:
        self._levels = levels
        places = (torch.arange(len(levels), device=levels.device) + offset) % _CLASSES
        self._own = []
        for one in range(_CLASSES):
            ids = (places == one).nonzero().squeeze(1)
            ids = ids[levels[ids].argsort()]
            sorted_levels = levels[ids]
            middles = (sorted_levels[1:] + sorted_levels[:-1]) / 2
            self._own.append((ids, sorted_levels, costs[ids], middles))
        into = torch.tensor(_INTO, device=levels.device)
        self._into = into[:, :, 0] * 2 + into[:, :, 1]  # [states, 2], into [states, kinds] laid out flat

    def codes(self, rows: Tensor, metrics: Tensor, inverse: Tensor | None) -> Tensor:
        """int64 `[groups, rows, columns]`."""
        rest, (groups, count, columns) = rows.clone(), rows.shape
        codes = torch.empty(rows.shape, dtype=torch.int64, device=rows.device)
        state = torch.zeros(groups, count, dtype=torch.int64, device=rows.device)
        for start in range(0, columns, _COLUMNS):
            end = min(columns, start + _COLUMNS)
            own = None if inverse is None else inverse[:, start:end, start:end]
            codes[:, :, start:end], state = self._walks(rest[:, :, start:end], metrics[:, start:end], own, state)
            if inverse is not None and end < columns:
                errors = self._errors(rest[:, :, start:end], codes[:, :, start:end], metrics[:, start:end], own)
                rest[:, :, end:] -= errors @ inverse[:, start:end, end:]
        return codes

    def _walks(self, rows: Tensor, metrics: Tensor, inverse: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """The best walks from given states through some columns, and the states in which they end."""
        groups, count, columns = rows.shape
        total = torch.full((groups, count, STATES), torch.inf, dtype=rows.dtype, device=rows.device)
        total.scatter_(2, state[:, :, None], 0.0)
        rest = rows.unsqueeze(2).expand(-1, -1, STATES, -1).contiguous()
        base = torch.arange(groups * count, device=rows.device).unsqueeze(1) * STATES
        steps, done = [], 0
        for column in range(columns):
            if column - done == _PART:
                rest, done = rest[..., _PART:].contiguous(), column
            here = column - done
            cost, code, error = self._choices(rest[..., here], metrics[:, column])
            cost += total.unsqueeze(3)
            pairs = cost.flatten(2)[:, :, self._into]  # [groups, rows, states, 2]
            total, pick = pairs.min(3)
            path = self._into.expand(groups, count, -1, -1).gather(3, pick.unsqueeze(3)).squeeze(3)
            steps.append((code.flatten(2).gather(2, path), path >> 1))
            if column + 1 == columns:
                break
            source = (base + (path >> 1).flatten(0, 1)).flatten()
            rest = rest.flatten(0, 2).index_select(0, source).view(rest.shape)
            if inverse is not None:
                moved = error.flatten(2).gather(2, path) * metrics[:, column, None, None]
                tail = inverse[:, column, None, None, column + 1 : min(columns, done + rest.shape[3])]
                rest[..., here + 1 :] -= moved.unsqueeze(3) * tail
        return _traced(steps, total.argmin(2))

    def _choices(self, x: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each state and each kind of code: the cheapest code, its cost, and its error.

        Args:
            x: `[groups, rows, states]`.
            metric: `[groups]`.

        Returns:
            `[groups, rows, states, 2]` each.
        """
        shape = (*x.shape, 2)
        cost, error = x.new_empty(shape), x.new_empty(shape)
        code = torch.empty(shape, dtype=torch.int64, device=x.device)
        weight = metric.square().view(-1, 1, 1)
        for one, (ids, levels, costs, middles) in enumerate(self._own):
            quantizer, kind = one & 1, one >> 1
            points = x[:, :, quantizer::2].contiguous()
            near = torch.bucketize(points, middles)
            best = chosen = missed = None
            for step in _NEIGHBOURS:
                place = (near + step).clamp_(0, len(levels) - 1)
                off = points - levels[place]
                own = torch.addcmul(costs[place], weight, off.square())
                if best is None or chosen is None or missed is None:
                    best, chosen, missed = own, place, off
                    continue
                less = own < best
                best, chosen = torch.where(less, own, best), torch.where(less, place, chosen)
                missed = torch.where(less, off, missed)
            assert best is not None and chosen is not None and missed is not None
            cost[:, :, quantizer::2, kind], error[:, :, quantizer::2, kind] = best, missed
            code[:, :, quantizer::2, kind] = ids[chosen]
        return cost, code, error

    def _errors(self, rows: Tensor, codes: Tensor, metrics: Tensor, inverse: Tensor | None) -> Tensor:
        """The errors of codes, times their metric, with those of earlier columns fed back: as `rows`."""
        rest = rows.clone()
        decoded = self._levels[codes]
        for column in range(rows.shape[2]):
            rest[:, :, column] = (rest[:, :, column] - decoded[:, :, column]) * metrics[:, column, None]
            if inverse is not None:
                tail = inverse[:, column, None, column + 1 :]
                rest[:, :, column + 1 :] -= rest[:, :, column, None] * tail
        return rest


def _traced(steps: list[tuple[Tensor, Tensor]], state: Tensor) -> tuple[Tensor, Tensor]:
    """The codes along the paths that end in given states, first column first, and these states."""
    codes, at = [], state.unsqueeze(2)
    for code, source in reversed(steps):
        codes.append(code.gather(2, at).squeeze(2))
        at = source.gather(2, at)
    return torch.stack(codes[::-1], dim=2), state
