"""Decoding as a mere copy of codewords, by numpy: several times as fast as torch's look-up, and the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from bgd_plugin.support.direct import runs_directly

__all__ = ["can_copy", "copied"]

_MOST = 1 << 15
"""Codes that are looked up at once; numpy widens them to 64 bits."""
_TYPES = (torch.float32, torch.float16, torch.float64)


def can_copy(codebook: Tensor, codes: Tensor) -> bool:
    """Whether decoding is no more than copying, here and now on a CPU: no gradient, no graph, a type that numpy has.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`, any integer type.
    """
    if torch.is_grad_enabled() and codebook.requires_grad:
        return False
    if torch.compiler.is_compiling() or codebook.dtype not in _TYPES:
        return False
    return runs_directly(codebook) and runs_directly(codes)


def copied(codebook: Tensor, codes: Tensor) -> Tensor:
    """The codewords of codes `[rows, blocks_per_row]`, `[rows, blocks_per_row, block_size]`.

    Args:
        codebook: `[codebook_size, block_size]`.
        codes: `[rows, blocks_per_row]`, not negative.

    Raises:
        IndexError: a code without a codeword.
    """
    words = codebook.detach().numpy()
    if codes.numel() <= _MOST:
        return torch.from_numpy(words.take(codes.numpy(), axis=0))
    result = codebook.new_empty(*codes.shape, codebook.shape[1])
    rows = max(1, _MOST // codes.shape[1])
    for part, found in zip(torch.split(codes, rows), torch.split(result, rows), strict=True):
        found.copy_(torch.from_numpy(words.take(part.numpy(), axis=0)))
    return result
