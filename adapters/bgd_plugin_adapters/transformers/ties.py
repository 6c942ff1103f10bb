"""Tied weights of quantized layers.

transformers ties parameters by name, `lm_head.weight` to `model.embed_tokens.weight`. A quantized layer has no
parameter of that name: it shares codebook and codes instead, and the names leave transformers' lists. So does a float
layer whose weight is held narrow: it shares its numbers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bgd_plugin.integration import NarrowModule, PQModule

__all__ = ["forget_names", "remember_names", "repeated", "share_", "shared"]


def shared(model: nn.Module) -> dict[str, str]:
    """Quantized layers that share their codebook with an earlier one, and that one, by path."""
    first: dict[int, str] = {}
    layers = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PQModule)]
    return {path: first[id(m.codebook)] for path, m in layers if first.setdefault(id(m.codebook), path) != path}


def repeated(model: nn.Module) -> dict[str, str]:
    """Narrow layers that share their weight with an earlier one, and that one, by path."""
    first: dict[int, str] = {}
    layers = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, NarrowModule)]
    return {path: first[id(m.numbers)] for path, m in layers if first.setdefault(id(m.numbers), path) != path}


def share_(model: nn.Module, pairs: dict[str, str]) -> None:
    """Make pairs of layers, by path, share codebook and codes, if these are equal."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, first in pairs.items():
        layer, other = modules.get(path), modules.get(first)
        if not isinstance(layer, PQModule) or not isinstance(other, PQModule) or layer is other:
            continue
        if torch.equal(layer.codes, other.codes) and torch.equal(layer.codebook, other.codebook):
            layer.codebook, layer.codes = other.codebook, other.codes


def forget_names(model: Any) -> dict[str, str]:
    """Remove our layers from transformers' lists of tied names; returns the pairs of layers removed."""
    ours = (PQModule, NarrowModule)
    layers = {path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, ours)}
    pairs: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PreTrainedModel):
            continue
        inside = {path.removeprefix(f"{prefix}.") for path in layers if not prefix or path.startswith(f"{prefix}.")}
        found: dict[str, str] = getattr(module, "all_tied_weights_keys", {})
        gone = {k: v for k, v in found.items() if {_layer(k), _layer(v)} & inside}
        if not gone:
            continue
        module.all_tied_weights_keys = {k: v for k, v in found.items() if k not in gone}
        names = module._tied_weights_keys or {}
        kept = {k: v for k, v in names.items() if not any(re.search(f"^{k}", target) for target in gone)}
        module._tied_weights_keys = kept or None
        if not prefix:
            pairs = {_layer(k): _layer(v) for k, v in gone.items()}
    return pairs


def remember_names(model: Any) -> None:
    """Undo `forget_names`, for a model with ordinary layers again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
