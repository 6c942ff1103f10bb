"""Fold parametrizations: a weight that is computed at each call becomes a plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from bgd_plugin.graph.standardized import fold_computed_weights_

__all__ = ["fold_parametrizations_"]

_OLD_NORMS = ("WeightNorm", "SpectralNorm")


@torch.no_grad()
def fold_parametrizations_(model: nn.Module) -> dict[str, str]:
    """Fold every parametrized weight, in place; tensors are replaced, never written to.

    Both of torch's forms are folded: `torch.nn.utils.parametrize` (weight norm, spectral norm, the user's own), and the
    older hooks of `torch.nn.utils.weight_norm` and `spectral_norm`.

    Returns:
        by layer, what computed its weight.
    """
    folded: dict[str, str] = {}
    for path, module in list(model.named_modules()):
        kinds = _fold_parametrize(module) + _fold_hooks(module)
        if kinds:
            folded[path] = ", ".join(kinds)
    return folded | fold_computed_weights_(model)


def _fold_parametrize(module: Any) -> list[str]:
    """As `parametrize.remove_parametrizations`, which would change the class that a copy shares with its original."""
    if not parametrize.is_parametrized(module):
        return []
    parts = module.parametrizations
    kinds = [type(part).__name__.strip("_") for steps in parts.values() for part in steps]
    was_training = module.training
    module.eval()  # spectral norm moves its vectors at each reading in training mode
    weights = {
        name: nn.Parameter(getattr(module, name).detach().clone(), any(p.requires_grad for p in steps.parameters()))
        for name, steps in parts.items()
    }
    module.train(was_training)
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, weight in weights.items():
        module.register_parameter(name, weight)
    return kinds


def _fold_hooks(module: Any) -> list[str]:
    kinds = []
    for key, hook in list(module._forward_pre_hooks.items()):
        kind = type(hook).__name__
        if kind not in _OLD_NORMS or not type(hook).__module__.startswith("torch.nn.utils"):
            continue
        weight = hook.compute_weight(module) if kind == "WeightNorm" else hook.compute_weight(module, False)
        parts = ("_g", "_v") if kind == "WeightNorm" else ("_orig",)
        learnt = any(module._parameters[hook.name + part].requires_grad for part in parts)
        for part in (*parts, *(("_u", "_v") if kind == "SpectralNorm" else ())):
            module._parameters.pop(hook.name + part, None)
            module._buffers.pop(hook.name + part, None)
        del module._forward_pre_hooks[key]
        vars(module).pop(hook.name, None)
        module.register_parameter(hook.name, nn.Parameter(weight.detach().clone(), requires_grad=learnt))
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for other, candidate in list(hooks.items()):
                if type(getattr(candidate, "hook", candidate)).__name__.startswith(kind):
                    del hooks[other]
        kinds.append(kind)
    return kinds
