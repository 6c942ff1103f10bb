"""Checkpoints of `Trainer`: folders that are loaded into an existing quantized model.

Training changes codebooks, never codes. A checkpoint with other codes belongs to another quantized model, and neither
its optimizer state nor its codebooks fit this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.integration import CheckpointError, PQModule
from bgd_plugin_adapters.transformers.files import code_name, unpacked_codes, unpacked_mask
from bgd_plugin_adapters.transformers.ties import repeated, shared

__all__ = ["accept_packed_codes"]


def accept_packed_codes(model: nn.Module) -> None:
    """Make a model's `load_state_dict` accept packed codes; a second call changes nothing."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _unpack_codes for hook in hooks):
        hooked: Any = model  # torch has no types for this
        hooked.register_load_state_dict_pre_hook(_unpack_codes)


def _unpack_codes(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace packed tensors by those of the model's own state dict, in place.

    Raises:
        CheckpointError: the codes are not the model's.
    """
    layers = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PQModule)}
    for path, layer in layers.items():
        name = f"{prefix}{code_name(path, layer)}"
        packed = state_dict.get(name)
        if not isinstance(packed, Tensor) or packed.ndim != 1 or packed.dtype != torch.uint8:
            continue
        del state_dict[name]
        _require_same(path, layer, packed)
        state_dict[f"{prefix}{path}.codes"] = layer.codes
        mask = state_dict.get(f"{prefix}{path}.mask")
        if layer.mask is not None and isinstance(mask, Tensor) and mask.ndim == 1:
            state_dict[f"{prefix}{path}.mask"] = unpacked_mask(layer, mask)
    for path, first in shared(model).items():
        for part in ("codes", "codebook", "mask"):
            if f"{prefix}{first}.{part}" in state_dict:
                state_dict.setdefault(f"{prefix}{path}.{part}", state_dict[f"{prefix}{first}.{part}"])
    for path, first in repeated(model).items():
        if f"{prefix}{first}.weight" in state_dict:
            state_dict.setdefault(f"{prefix}{path}.weight", state_dict[f"{prefix}{first}.weight"])


def _require_same(path: str, layer: PQModule, packed: Tensor) -> None:
    try:
        is_same = torch.equal(unpacked_codes(path, layer, packed).to(layer.codes.device), layer.codes)
    except ValueError:  # another number of codes
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"the checkpoint has other codes for layer {path!r} than the model: it belongs to another quantized model; "
            "load the model from the checkpoint (from_pretrained) to continue from it"
        )
