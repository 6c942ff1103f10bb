"""Layer norms and root mean square norms, told by what they compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Affine", "affine_of", "may_be_norm", "neutralize_"]

_ROWS = 16
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Affine:
    """What a norm does to its normalized input.

    Attributes:
        gain: float64 `[features]`, what it multiplies by.
        shift: float64 `[features]`, what it adds.
    """

    gain: Tensor
    shift: Tensor

    @property
    def has_shift(self) -> bool:
        """Whether it adds anything."""
        return bool((self.shift.abs() > 1e-5 * self.gain.abs().max()).any())


def may_be_norm(module: nn.Module) -> bool:
    """Whether a module could be a norm over the last dimension: one or two vectors of one length, and nothing else."""
    parameters = [p for p in module._parameters.values() if p is not None]
    sizes = {tuple(p.shape) for p in parameters}
    is_bare = not module._modules and not any(b is not None for b in module._buffers.values())
    return is_bare and 1 <= len(parameters) <= 2 and len(sizes) == 1 and all(p.ndim == 1 for p in parameters)


@torch.no_grad()
def affine_of(norm: nn.Module) -> Affine | None:
    """Gain and shift of a norm over the last dimension; None if the module computes something else.

    Norms divide by the root mean square, or subtract the mean first. Both are tried on random rows.
    """
    parameter = next(p for p in norm._parameters.values() if p is not None)
    features = parameter.numel()
    if features < 2 or not parameter.is_floating_point() or parameter.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(_ROWS, features, generator=generator, device="cpu").to(parameter) + 0.5
    try:
        y = norm(x)
    except Exception:  # a module of another kind may refuse such rows with any error
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    x, y = x.double(), y.double()
    for centred in (x, x - x.mean(1, keepdim=True)):
        normalized = centred / centred.square().mean(1, keepdim=True).sqrt()
        found = _regression(normalized, y)
        if found is not None:
            return found
    return None


def neutralize_(norm: nn.Module) -> bool:
    """Set a norm's parameters so that its gain is 1 and its shift 0; returns whether that is possible."""
    for value in (1.0, 0.0):  # a norm may multiply by 1 + weight
        trial = copy.deepcopy(norm)
        _fill_(trial, value)
        affine = affine_of(trial)
        if affine is not None and not affine.has_shift and bool((affine.gain - 1).abs().max() < _TOLERANCE):
            _fill_(norm, value)
            return True
    return False


def _regression(x: Tensor, y: Tensor) -> Affine | None:
    """Gain and shift of each column that make `y` of `x`, if they do."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    gain = ((x - mean_x) * (y - mean_y)).sum(0) / (x - mean_x).square().sum(0)
    shift = mean_y - gain * mean_x
    error = (x * gain + shift - y).abs().max()
    half = 0.05 if y.dtype in (torch.bfloat16, torch.float16) else _TOLERANCE
    if not bool(error <= half * y.abs().max()):
        return None
    return Affine(gain=gain, shift=shift)


def _fill_(norm: nn.Module, gain: float) -> None:
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            filled = torch.full_like(parameter.detach(), 0.0 if name == "bias" else gain)
            norm._parameters[name] = nn.Parameter(filled, parameter.requires_grad)
