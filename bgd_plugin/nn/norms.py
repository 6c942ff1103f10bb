"""Normalizations with running statistics, told by what they compute and not by their class.

A class that derives from a batch norm may do more: apply an activation, a gate. Where a module's `forward` is not
torch's own, a small batch of random numbers shows what it does.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["has_running_statistics", "is_batchnorm", "normalizes"]

_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
_DIMENSIONS = (2, 0, 1, 3)  # of the positions, the commonest first
_TOLERANCE = 1e-3


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics, or holds what one holds, as `FrozenBatchNorm2d` does."""
    state = {**module._parameters, **module._buffers}  # not by attribute: a tracer would note each reading
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return state.get("running_mean") is not None
    parts = [state.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    vectors = [part for part in parts if isinstance(part, Tensor) and part.ndim == 1]
    return len(vectors) == 4 and isinstance(vars(module).get("eps"), float) and not module._modules


def normalizes(module: nn.Module) -> bool:
    """Whether all that a module does begins with a batch norm in evaluation mode: an activation may follow.

    Then a factor and a summand on its input's channels can be taken out by its statistics, and statistics can be
    matched. A hook that sees the input first may change it, so none is allowed.
    """
    if not has_running_statistics(module) or module._forward_pre_hooks:
        return False
    return _is_torchs(module) or _verdict(module).begins_with_norm


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module computes a batch norm in evaluation mode and nothing else, its hooks aside."""
    return has_running_statistics(module) and (_is_torchs(module) or _verdict(module).is_norm)


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module runs the code of torch's batch norm."""
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and type(module).forward in _FORWARDS
        and "forward" not in vars(module)
        and type(module).__call__ is nn.Module.__call__
    )


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    begins_with_norm: bool = False
    is_norm: bool = False


_verdicts: weakref.WeakKeyDictionary[nn.Module, _Verdict] = weakref.WeakKeyDictionary()


def _verdict(module: nn.Module) -> _Verdict:
    """What a module that is not torch's own computes."""
    if module not in _verdicts:
        is_known = "forward" not in vars(module) and type(module).__call__ is nn.Module.__call__
        is_meta = any(t.is_meta for t in (*module.parameters(), *module.buffers()))
        _verdicts[module] = _probed(module) if is_known and not is_meta else _Verdict()
    return _verdicts[module]


@torch.no_grad()
def _probed(module: nn.Module) -> _Verdict:
    try:
        norm = _bare_copy(module)
    except Exception:  # an attribute that cannot be copied: what the module does stays unknown
        return _Verdict()
    mean, variance = norm.running_mean, norm.running_var
    if not mean.is_floating_point() or not bool(torch.isfinite(variance).all()) or bool((variance < 0).any()):
        return _Verdict()
    generator = torch.Generator().manual_seed(0)
    for dimensions in _DIMENSIONS:
        shape = (4, mean.numel(), *(3 for _ in range(dimensions)))
        noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(mean)
        channels = (-1, *(1 for _ in range(dimensions)))
        deviation = (variance + norm.eps).sqrt()
        x = mean.reshape(channels) + 2 * deviation.reshape(channels) * noise
        try:
            output = norm(x)
        except Exception:  # not this many dimensions
            continue
        plain = functional.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        factor = torch.linspace(1.1, 1.7, mean.numel(), dtype=torch.float32).to(mean)
        shift = torch.linspace(-1, 1, mean.numel(), dtype=torch.float32).to(mean) * deviation
        norm.running_mean = mean * factor + shift
        norm.running_var = (variance + norm.eps) * factor.square() - norm.eps
        moved = norm(x * factor.reshape(channels) + shift.reshape(channels))
        return _Verdict(begins_with_norm=_are_close(output, moved), is_norm=_are_close(output, plain))
    return _Verdict()


def _bare_copy(module: nn.Module) -> Any:
    """A copy without hooks, in evaluation mode, whose tensors are its own."""
    result = module.__class__.__new__(module.__class__)
    vars(result).update({k: OrderedDict() if k.endswith("_hooks") else v for k, v in vars(module).items()})
    for table in ("_parameters", "_buffers"):
        own = {k: None if v is None else v.detach().clone() for k, v in vars(module)[table].items()}
        vars(result)[table] = {
            k: nn.Parameter(v, v.is_floating_point()) if table == "_parameters" and v is not None else v
            for k, v in own.items()
        }
    result._modules = copy.deepcopy(module._modules)
    return result.eval()


def _are_close(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
