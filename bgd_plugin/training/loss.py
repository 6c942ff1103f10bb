"""The loss of distillation, and the gradient of a codeword."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.errors import CalibrationError
from bgd_plugin.nn import PQModule

__all__ = ["codebooks", "kl_to_teacher", "mean_gradients_"]

_PIECE = 1 << 18
"""Logits compared at once: the temporary values of so many stay in a cache, which is four times as fast."""


def kl_to_teacher(student: Tensor, teacher: Tensor, tokens: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) of the logits at temperature 1, averaged over samples (and tokens or pixels).

    Args:
        student, teacher: logits of one shape: `[batch, classes]`, `[batch, tokens, classes]` or
            `[batch, classes, height, width]`.
        tokens: `[batch, tokens]`, true where a token counts; None: all count.

    Returns:
        a scalar, in nats.

    Raises:
        CalibrationError: the shapes differ.

    **Source**: arXiv 1907.05686, section 3.3.
    """
    if student.shape != teacher.shape:
        raise CalibrationError(
            f"the teacher's logits have shape {list(teacher.shape)}, the network's {list(student.shape)}: "
            "give a teacher with the same classes"
        )
    dim = 1 if student.ndim in (2, 4) else -1
    found, exact = (logits.movedim(dim, -1).reshape(-1, logits.shape[dim]) for logits in (student, teacher))
    if tokens is not None:
        found, exact = found[tokens.flatten()], exact[tokens.flatten()]
    rows = max(1, _PIECE // max(1, found.shape[1]))
    sums = [
        F.kl_div(F.log_softmax(q.float(), 1), F.log_softmax(p.float(), 1), reduction="sum", log_target=True)
        for q, p in zip(torch.split(found, rows), torch.split(exact, rows), strict=True)
    ]
    return torch.stack(sums).sum() / len(found)


def codebooks(modules: Iterable[nn.Module]) -> list[PQModule]:
    """The product-quantized modules among `modules`, each codebook once."""
    return list({id(m.codebook): m for m in modules if isinstance(m, PQModule)}.values())


def mean_gradients_(layers: Iterable[PQModule]) -> None:
    """Divide each codeword's gradient, a sum over its blocks, by the number of blocks, in place.

    **Source**: arXiv 1907.05686, equation 9.
    """
    for layer in layers:
        if layer.codebook.grad is not None:
            layer.codebook.grad /= layer.codeword_uses().clamp(min=1)
