"""Quantized layers in the files of a transformers folder.

The packed codes have the name of the float *weight*, and are a row of bytes: loading the folder without this adapter
then raises transformers' error about mismatched sizes, instead of giving a model with random weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bgd_plugin.integration import CheckpointError, ConfigError, PQModule, PQWeight, pack, unpack
from bgd_plugin_adapters.transformers.ties import repeated, shared

__all__ = [
    "checked_files",
    "checksum",
    "code_name",
    "packed_lengths",
    "packed_state",
    "unpacked_codes",
    "unpacked_mask",
]

# A quantized layer's tensors in a file, besides its bias.
_PARTS = ("codes", "weight", "codebook", "mask")


def code_name(path: str, layer: PQModule) -> str:
    """The name in a file of the packed codes of the layer at `path`."""
    return f"{path}.codes" if isinstance(layer, PQWeight) else f"{path}.weight"


def packed_state(model: nn.Module, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A state dict with packed codes, and floats in half precision if that is exact.

    Tensors that share memory stay one tensor, and a layer tied to an earlier one is left out.

    Args:
        model: the quantized model.
        given: the state dict, if it is not the model's own; it may hold a part of the model.

    Raises:
        ConfigError: a state dict that lacks a part of a layer, or has codes of another shape; tensors without values.
    """
    layers = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PQModule)}
    state = dict(model.state_dict() if given is None else given)
    ties, again = shared(model), repeated(model)
    halves: dict[tuple[Any, ...], Tensor] = {}
    result: dict[str, Any] = {}
    for name, value in state.items():
        path, _, part = name.rpartition(".")
        if isinstance(value, Tensor) and value.is_meta:
            raise ConfigError(f"{name!r} is offloaded to disk: load the model without 'disk' in device_map to save it")
        if path in layers and part == "codes":
            _require_whole(path, layers[path], value, state)
        source = ties.get(path)
        if source is not None and part in _PARTS and f"{source}.{part}" in state:
            continue
        if path in again and part == "weight" and f"{again[path]}.weight" in state:
            continue
        if path in layers and part == "codes":
            result[code_name(path, layers[path])] = pack(value.reshape(-1), layers[path].code_bits)
        elif path in layers and part == "mask":
            result[name] = pack(value.to(torch.uint8), 1)
        elif isinstance(value, Tensor):
            result[name] = _halved(value, halves)
        else:
            result[name] = value
    return result


def _require_whole(path: str, layer: PQModule, codes: Tensor, state: Mapping[str, Any]) -> None:
    if f"{path}.codebook" not in state or codes.shape != layer.codes.shape:
        raise ConfigError(
            f"layer {path!r}: the state dict has codes {list(codes.shape)}, the layer {list(layer.codes.shape)} and a "
            "codebook: give all tensors of a layer or none"
        )


def _halved(value: Tensor, halves: dict[tuple[Any, ...], Tensor]) -> Tensor:
    """A tensor in half precision if that is exact; tensors that share memory give the same tensor."""
    if hasattr(value, "full_tensor"):  # sharded over processes
        value = value.full_tensor()
    if value.dtype not in (torch.float32, torch.float64):
        return value
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
    if key not in halves or not value.numel():
        half = value.half()
        halves[key] = half if torch.equal(half.to(value.dtype), value) else value
    return halves[key]


def unpacked_codes(path: str, layer: PQModule, packed: Tensor) -> Tensor:
    """The codes of the layer at `path`.

    Args:
        path: for the message.
        layer: with codes of the right shape.
        packed: uint8 `[bytes]`.

    Returns:
        integers `[rows, blocks_per_row]`.

    Raises:
        CheckpointError: a code is out of range.
    """
    codes = unpack(packed, layer.code_bits, layer.codes.numel())
    if codes.numel() and int(codes.max()) >= layer.codebook_size:
        raise CheckpointError(f"layer {path!r}: code {int(codes.max())} is out of range: the file is damaged")
    return codes.reshape(layer.codes.shape).to(layer.form.codes_dtype(layer.codebook_size))


def unpacked_mask(layer: PQModule, packed: Tensor) -> Tensor:
    """The mask of a layer, bool `[*weight_shape]`, from packed bits, uint8 `[bytes]`."""
    assert layer.mask is not None
    return unpack(packed, 1, layer.mask.numel()).bool().reshape(layer.mask.shape)


def packed_lengths(files: Iterable[str]) -> dict[str, int]:
    """The number of bytes of each one-dimensional uint8 tensor in the files, by name."""
    lengths: dict[str, int] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                part = content.get_slice(name)
                if part.get_dtype() == "U8" and len(part.get_shape()) == 1:
                    lengths[name] = part.get_shape()[0]
    return lengths


def checksum(layers: Iterable[str], state: Mapping[str, Any]) -> str:
    """A digest of all codes and codebooks, as they are stored: of the layers (paths) in a state dict."""
    digest = hashlib.sha256()
    for path in sorted(layers):
        for name in (f"{path}.{part}" for part in _PARTS):
            value = state.get(name)
            if value is not None:
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checked_files(files: Iterable[str], layers: Mapping[str, Any], expected: str | None) -> None:
    """Check that the quantized layers in `config.json` and in the files are the same.

    Args:
        files: of the folder.
        layers: those with their own tensors, by path.
        expected: the checksum in `config.json`.

    Raises:
        CheckpointError: a layer is missing on one side, or codes or codebooks were changed.
    """
    names: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            names |= dict.fromkeys(content.keys(), file)
    packed = packed_lengths(set(names.values()))
    stems = {name.removesuffix(".codebook") for name in names if name.endswith(".codebook")}
    inside = {path for path in stems if f"{path}.weight" in packed or f"{path}.codes" in packed}
    layers = {path: sizes for path, sizes in layers.items() if len(sizes) > 1}  # not the norms
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
