"""Weights that code reads by name, such as `in_proj_weight`, while transformers loads a model.

In a quantized model such a name is a property that decodes the weight. transformers expects a module or a tensor, so
while a folder is loaded the name refers to the module.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bgd_plugin.integration import PQWeight, compute_parameter_, loosen_parameter_

__all__ = ["compute_weights_", "loose_weights_"]


def loose_weights_(model: nn.Module) -> None:
    """Make every computed weight a plain module, which the initialization of new layers skips."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, PQWeight):
            holder, name = _holder(model, path)
            loosen_parameter_(holder, name)
            marked: Any = module
            marked._is_hf_initialized = True


def compute_weights_(model: nn.Module) -> None:
    """Undo `loose_weights_`."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        holder, name = _holder(model, path)
        if isinstance(module, PQWeight) and not hasattr(type(holder), name):  # no property yet
            compute_parameter_(holder, name, module)


def _holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The owner of the module at a path, and its name there."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name
