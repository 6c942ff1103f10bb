"""Uniform grids, as most weight-only quantizers have them: rounding to nearest, and GPTQ. Written from the papers."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.calibration import LayerInputs, paired_pieces
from bgd_plugin.encoding.codes import pack
from bgd_plugin.pq.feedback import damped
from tests.benchmarks.peers.build import PackedWeight, Quantizer

__all__ = ["GROUP", "gptq", "round_to_nearest"]

GROUP = 32
"""Weights of a row that share a scale and a zero point; a row's last group may be shorter."""
_GPTQ_DAMPING = 0.01  # of the mean diagonal: the paper's
_ROWS, _ROWS_PER_COLUMN = 32_768, 8  # rows of inputs in a Gram matrix: as many as the library's default method takes


def round_to_nearest(bits: int) -> Quantizer:
    """Each weight to the nearest point of its group's grid; no data."""

    def quantize(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
        rows = weight.flatten(1).float()
        return _packed(weight, [_on_grid(group, *_grid(group, bits), bits) for group in rows.split(GROUP, 1)], bits)

    return quantize


def gptq(bits: int, *, by_activation: bool = False) -> Quantizer:
    """The same grids, with the error of each column passed on to the columns still to come.

    **Source**: Frantar et al., "GPTQ", arXiv 2210.17323, algorithm 1.

    Args:
        bits: of a code.
        by_activation: columns with the largest inputs first ("act-order"), groups in that order; else their own order.
    """

    def quantize(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
        rows = weight.flatten(1).float()
        gram = _gram(inputs, rows.shape[1])
        if not by_activation:
            return _packed(weight, _fed_back(rows, gram, bits), bits)
        order = gram.diagonal().argsort(descending=True)
        packed = _packed(rows, _fed_back(rows[:, order], gram[order][:, order], bits), bits)
        decoded = packed.weight[:, order.argsort()].reshape(weight.shape)
        return PackedWeight(weight=decoded, tensors={**packed.tensors, "order": order.to(torch.int16)})

    return quantize


_Group = tuple[Tensor, Tensor, Tensor]
"""Codes `[rows, columns]`, scale `[rows, 1]`, zero point `[rows, 1]`."""


def _grid(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[rows, 1]` of a grid from the least to the largest weight, with 0 on it."""
    low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7).half().float()
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _on_grid(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> _Group:
    return (values / scale + zero).round().clamp(0, 2**bits - 1), scale, zero


def _fed_back(weight: Tensor, gram: Tensor, bits: int) -> list[_Group]:
    """All groups of a weight `[rows, columns]` in the order of its columns."""
    rest = weight.clone()
    upper = _inverse_factor(gram)
    groups = []
    for start in range(0, rest.shape[1], GROUP):
        stop = min(start + GROUP, rest.shape[1])
        groups.append(_feed_back(rest[:, start:stop], upper[start:stop, start:], rest[:, stop:], bits))
    return groups


def _feed_back(group: Tensor, upper: Tensor, later: Tensor, bits: int) -> _Group:
    """Codes of one group's columns; what they lose is taken up by `group`'s and `later`'s columns, in place."""
    scale, zero = _grid(group, bits)
    codes, errors = torch.empty_like(group), torch.empty_like(group)
    width = group.shape[1]
    for j in range(width):
        codes[:, j : j + 1] = _on_grid(group[:, j : j + 1], scale, zero, bits)[0]
        decoded = (codes[:, j : j + 1] - zero) * scale
        errors[:, j : j + 1] = (group[:, j : j + 1] - decoded) / upper[j, j]
        group[:, j:] -= errors[:, j : j + 1] * upper[j, j:width]
    later -= errors @ upper[:, width:]
    return codes, scale, zero


def _gram(inputs: LayerInputs, columns: int) -> Tensor:
    """The damped Gram `[columns, columns]` of the compressed network's inputs, float64."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, columns, columns, dtype=torch.float64)
    for piece in paired_pieces(inputs, max(_ROWS, _ROWS_PER_COLUMN * columns), generator):
        assert len(piece.student) == 1, "none of the layers here is a grouped convolution"
        total += piece.student.mT @ piece.student
    return damped(total, _GPTQ_DAMPING)[0]


def _inverse_factor(gram: Tensor) -> Tensor:
    """U, upper triangular, with H⁻¹ = Uᵀ U."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _packed(weight: Tensor, groups: list[_Group], bits: int) -> PackedWeight:
    """Packed codes and zero points, scales in half precision."""
    codes, zeros = (torch.cat([group[i] for group in groups], 1).to(torch.int64) for i in (0, 2))
    decoded = torch.cat([(codes - zero) * scale for codes, scale, zero in groups], 1)
    scales = torch.cat([scale for _, scale, _ in groups], 1).half()
    tensors = {"codes": pack(codes.flatten(), bits), "zeros": pack(zeros.flatten(), bits), "scales": scales}
    return PackedWeight(weight=decoded.reshape(weight.shape), tensors=tensors)
