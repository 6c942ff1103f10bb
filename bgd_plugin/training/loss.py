"""The loss of distillation, and the gradient of a codeword."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.errors import CalibrationError
from bgd_plugin.nn import PQModule

__all__ = ["codebooks", "kl_to_teacher", "mean_gradients_"]


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
    classes = student.shape[dim]
    p = F.log_softmax(teacher.movedim(dim, -1).reshape(-1, classes).float(), dim=1)
    q = F.log_softmax(student.movedim(dim, -1).reshape(-1, classes).float(), dim=1)
    if tokens is not None:
        p, q = p[tokens.flatten()], q[tokens.flatten()]
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


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
