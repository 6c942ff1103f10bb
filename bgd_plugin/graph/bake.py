"""Bake pruning masks into the weights that they cover."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.sparse import SparseSemiStructuredTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bgd_plugin.errors import ConfigError
from bgd_plugin.graph.copying import copy_module
from bgd_plugin.graph.narrowing import widen_
from bgd_plugin.nn import NarrowModule

__all__ = ["baked"]


def baked(model: nn.Module) -> nn.Module:
    """The network with its pruning masks multiplied into the weights: the same outputs, plain parameters.

    Masks are those of `torch.nn.utils.prune` (a hook computes the weight before each call) and of `torch.ao.pruning`
    (a parametrization does). Neither is a parameter that could be compressed, and the first cannot even be copied.

    Args:
        model: the caller's network; not changed.

    Returns:
        `model` itself if it has no mask; otherwise a copy that shares every tensor that is not masked. Its masked
        parameters keep their names, without `_orig`. Weights that are held narrow are float parameters in it.

    Raises:
        ConfigError: a parameter is held as a sparse tensor, or as a tensor of another library's own kind.
    """
    _require_plain(model)
    if any(isinstance(module, NarrowModule) for module in model.modules()):
        model = widen_(copy_module(model, share_tensors=True))
    if not any(_hooks(module) or _sparse_tensors(module) for module in model.modules()):
        return model
    result: nn.Module = copy_module(model, share_tensors=True)
    for module in result.modules():
        for key, hook in _hooks(module).items():
            _bake_hook_(module, str(hook._tensor_name))
            del module._forward_pre_hooks[key]
        if names := _sparse_tensors(module):
            _bake_parametrizations_(module, names)
    return result


def _require_plain(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.layout is not torch.strided or isinstance(parameter, SparseSemiStructuredTensor):
            kind = type(parameter.data).__name__ if parameter.layout is torch.strided else parameter.layout
            raise ConfigError(
                f"{name!r} is a sparse tensor ({kind}): make it dense with to_dense(); preserve_zeros=True keeps zeros"
            )
        if is_traceable_wrapper_subclass(parameter):
            raise ConfigError(
                f"{name!r} is a tensor type of another library ({type(parameter).__name__}), already "
                "quantized or sharded: quantize the float network first, then let that library take the others"
            )


def _hooks(module: nn.Module) -> dict[int, BasePruningMethod]:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)}


@torch.no_grad()
def _bake_hook_(module: nn.Module, name: str) -> None:
    """As `torch.nn.utils.prune.remove`, which would write into the original parameter."""
    original, mask = module._parameters.pop(f"{name}_orig"), module._buffers.pop(f"{name}_mask")
    assert original is not None and mask is not None
    vars(module).pop(name, None)
    setattr(module, name, _masked(original, mask))  # not register_parameter: recurrent modules keep a list of theirs


def _masked(original: nn.Parameter, mask: Tensor) -> nn.Parameter:
    # `where`, since a product makes -0.0 of a negative weight
    kept = torch.where(mask != 0, original * mask.to(original.dtype), torch.zeros_like(original))
    return nn.Parameter(kept, requires_grad=original.requires_grad)


def _sparse_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters masked by a sparsifier of `torch.ao.pruning`; none if the module has other
    parametrizations, too: it then stays as it is, and the plan names it.
    """
    if not parametrize.is_parametrized(module):
        return []
    parametrizations: Any = module.parametrizations
    is_sparse = [all(isinstance(step, FakeSparsity) for step in steps) for steps in parametrizations.values()]
    return list(parametrizations) if all(is_sparse) else []


@torch.no_grad()
def _bake_parametrizations_(module: nn.Module, names: list[str]) -> None:
    """As `torch.nn.utils.parametrize.remove_parametrizations`, which would write into the original parameter and change
    the class that the copy shares with the caller's module.
    """
    parametrizations: Any = module.parametrizations
    weights = {
        name: nn.Parameter(getattr(module, name), parametrizations[name].original.requires_grad) for name in names
    }
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, weight in weights.items():
        setattr(module, name, weight)
