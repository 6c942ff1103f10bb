"""Normalizations with running statistics, in a form that does not ask whose class they are."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["has_running_statistics"]


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics, or computes as one: torchvision's `FrozenBatchNorm2d` does."""
    state = {**module._parameters, **module._buffers}  # not by attribute: a tracer would note each reading
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return state.get("running_mean") is not None
    parts = [state.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    vectors = [part for part in parts if isinstance(part, Tensor) and part.ndim == 1]
    return len(vectors) == 4 and isinstance(vars(module).get("eps"), float) and not module._modules
