"""A batch norm frozen in evaluation mode: one scale and one shift per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.nn.hooks import take_hooks_
from bgd_plugin.nn.norms import is_batchnorm

__all__ = ["FrozenNorm", "freeze_norms_"]


class FrozenNorm(nn.Module):
    """A batch norm with fixed statistics, in half the numbers; training mode computes the same.

    Attributes:
        weight, bias: `[channels]`, γ / √(σ² + eps) and β − μ · weight of the batch norm.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    @classmethod
    def of(cls, norm: Any) -> FrozenNorm:
        """From a batch norm with running statistics, affine or not."""
        mean, variance = norm.running_mean.detach().double(), norm.running_var.detach().double()
        gain = 1.0 if norm.weight is None else norm.weight.detach().double()
        offset = 0.0 if norm.bias is None else norm.bias.detach().double()
        weight = gain / (variance + norm.eps).sqrt()
        dtype = norm.running_mean.dtype
        return cls(weight.to(dtype), (offset - mean * weight).to(dtype)).train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift input `[batch, channels, ...]` or `[batch, channels]` per channel."""
        shape = (-1, *(1 for _ in input.shape[2:]))
        return torch.addcmul(self.bias.reshape(shape), input, self.weight.reshape(shape))

    def extra_repr(self) -> str:
        """Number of channels, for `print`."""
        return f"{len(self.weight)}"


def freeze_norms_(model: nn.Module) -> list[str]:
    """Replace every batch norm with running statistics by a `FrozenNorm`, in place; returns their paths.

    Norms that do more than a batch norm, such as one that includes an activation, stay as they are. Hooks are kept.
    """
    frozen: dict[int, FrozenNorm] = {}
    paths = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and is_batchnorm(module) and path:
            owner, _, name = path.rpartition(".")
            if id(module) not in frozen:
                frozen[id(module)] = FrozenNorm.of(module)
                take_hooks_(frozen[id(module)], module)
            model.get_submodule(owner)._modules[name] = frozen[id(module)]
            paths.append(path)
    return paths
