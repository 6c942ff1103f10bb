"""How a quantized layer lies in a transformers folder.

The packed codes stand under the name of the float *weight*, as a row of bytes: who loads the folder without this
adapter gets transformers' error about sizes that do not match, and not a model with random weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bgd_plugin.integration import CheckpointError, PQModule, PQWeight, code_dtype, pack, unpack

__all__ = [
    "PackedLayer",
    "checked_files",
    "checksum",
    "code_name",
    "mask_room",
    "packed_room",
    "packed_state",
    "unpacked_codes",
    "unpacked_mask",
]


# What a quantized layer has in a file, besides its bias.
_PARTS = ("codes", "weight", "codebook", "mask")


class PackedLayer(nn.Module):
    """Stands where a quantized layer will stand, while transformers loads its tensors."""

    def __init__(self, layer: PQModule) -> None:
        super().__init__()
        self.register_buffer(code_name("", layer).lstrip("."), packed_room(layer))
        self.register_buffer("mask", None if layer.mask is None else mask_room(layer))
        self.codebook = layer.codebook
        self.register_parameter("bias", getattr(layer, "bias", None))


def packed_room(layer: PQModule) -> Tensor:
    """As many bytes as the packed codes of a layer take."""
    length = -(-layer.codes.numel() * layer.code_bits // 8)
    return torch.empty(length, dtype=torch.uint8, device=layer.codes.device)


def mask_room(layer: PQModule) -> Tensor:
    """As many bytes as a layer's mask takes, a bit for each weight."""
    return torch.empty(-(-math.prod(layer.weight_shape) // 8), dtype=torch.uint8, device=layer.codes.device)


def code_name(path: str, layer: PQModule) -> str:
    """The name of a layer's packed codes in a file."""
    return f"{path}.codes" if isinstance(layer, PQWeight) else f"{path}.weight"


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict with packed codes, and floats in half precision where that loses nothing."""
    layers = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PQModule)}
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        if path in layers and attribute == "codes":
            layer = layers[path]
            state[code_name(path, layer)] = pack(layer.codes.reshape(-1), layer.code_bits)
        elif path in layers and attribute == "mask":
            state[name] = pack(value.to(torch.uint8), 1)
        else:
            half = value.half() if value.dtype in (torch.float32, torch.float64) else value
            state[name] = half if torch.equal(half.to(value.dtype), value) else value
    return state


def unpacked_codes(path: str, layer: PQModule, packed: Tensor) -> Tensor:
    """The codes of a layer.

    Raises:
        CheckpointError: a code that is out of range.
    """
    count = math.prod(layer.weight_shape) // layer.block_size
    codes = unpack(packed, layer.code_bits, count)
    if codes.numel() and int(codes.max()) >= layer.codebook_size:
        raise CheckpointError(f"layer {path!r}: code {int(codes.max())} is out of range: the file is damaged")
    return codes.reshape(layer.weight_shape[0], -1).to(code_dtype(layer.codebook_size))


def unpacked_mask(layer: PQModule, packed: Tensor) -> Tensor:
    """The mask of a layer, bool of its weight's shape."""
    return unpack(packed, 1, math.prod(layer.weight_shape)).bool().reshape(layer.weight_shape)


def checksum(layers: Iterable[str], state: Mapping[str, Any]) -> str:
    """A fingerprint of all codes and codebooks, as they are stored."""
    digest = hashlib.sha256()
    for path in sorted(layers):
        for name in (f"{path}.{part}" for part in _PARTS):
            value = state.get(name)
            if value is not None:
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checked_files(files: Iterable[str], layers: Mapping[str, Any], expected: str | None) -> None:
    """Compare what `config.json` says of the quantized layers with what the files hold.

    Raises:
        CheckpointError: a layer of either that the other lacks, or codes and codebooks that were changed.
    """
    names: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            names |= dict.fromkeys(content.keys(), file)
    stems = {name.removesuffix(".codebook") for name in names if name.endswith(".codebook")}
    inside = {path for path in stems if f"{path}.weight" in names or f"{path}.codes" in names}
    layers = {path: sizes for path, sizes in layers.items() if sizes}  # not the frozen norms
    problems = [f"{path!r} is missing in the files" for path in sorted(set(layers) - inside)]
    problems += [f"{path!r} is in the files, but not in config.json" for path in sorted(inside - set(layers))]
    wanted = {f"{path}.{part}" for path in layers for part in _PARTS} & set(names)
    state: dict[str, Tensor] = {}
    for file in set(names.values()):
        with safe_open(file, framework="pt") as content:
            state |= {name: content.get_tensor(name) for name in wanted if names[name] == file}
    if problems:
        raise CheckpointError("the folder's quantized layers do not agree:" + "".join(f"\n  {p}" for p in problems))
    if expected is None or checksum(layers, state) != expected:
        raise CheckpointError("codes or codebooks are not those that were saved: the folder was damaged or edited")
