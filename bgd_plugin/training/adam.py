"""Adam with one learning rate for tensors of any scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["relative_adam"]

_LEAST_SIZE = 1e-3


def relative_adam(
    parameters: Iterable[nn.Parameter], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Adam with learning rates relative to each parameter's root mean square, and cosine decay to zero.

    So one rate suits codebooks, norms and convolutions.

    Args:
        learning_rate: relative change of a parameter per step at the start, approximately.
        steps: number of steps after which the rate is zero.
    """
    groups = [{"params": [p], "lr": learning_rate * _size(p)} for p in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _size(parameter: Tensor) -> float:
    return max(_LEAST_SIZE, float(parameter.detach().float().square().mean().sqrt()))
