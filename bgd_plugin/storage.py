"""How a network lies in a file: which tensors, in which types, under which header. Sizes are those of real files.

A file is a safetensors file. Codes are packed to `log2(codebook_size)` bits, masks as `pq.masks` says; every other
tensor is stored in the narrowest type that holds its values *exactly*, so reading it back loses nothing. Tensors that
are one and the same are stored once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bgd_plugin.errors import CheckpointError
from bgd_plugin.nn import PQModule, storable
from bgd_plugin.pq.masks import mask_form, pack_mask
from bgd_plugin.pq.packing import pack

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "Stored",
    "file_bytes",
    "file_size",
    "round_floats_",
    "state_bytes",
    "stored",
]

FORMAT_VERSION = 1
METADATA_KEY = "bgd_plugin"

_INTEGERS = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What goes into a file.

    Attributes:
        tensors: by name, as they are stored; tensors on the meta device stand for themselves where only sizes matter.
        header: plain JSON values.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def stored(model: nn.Module) -> Stored:
    """The tensors and the header of a network's file.

    Raises:
        CheckpointError: the state holds something that is not a tensor.
    """
    layers = {
        path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, PQModule)
    }
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    masks: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} of the network's state is a {type(value).__name__}, not a tensor: cannot be saved"
            )
        first = names.setdefault(_identity(name, value), name)
        if first != name:
            aliases[name] = first
            continue
        path, _, attribute = name.rpartition(".")
        if path in layers and attribute == "codes":
            tensors[name] = _packed(layers[path])
            continue
        if path in layers and attribute == "mask":
            masks[path] = mask_form(value)
            tensors[name] = pack_mask(value, masks[path])
            continue
        tensors[name] = _narrowest(value, is_codebook=path in layers and attribute == "codebook")
        if tensors[name].dtype != value.dtype and value.dtype not in (torch.float32, torch.int64):
            dtypes[name] = str(value.dtype).removeprefix("torch.")
    header = {
        "format": FORMAT_VERSION,
        "layers": {path: _layer_header(layer) for path, layer in layers.items() if f"{path}.codes" in tensors},
    }
    if aliases:
        header["aliases"] = aliases
    if dtypes:
        header["dtypes"] = dtypes
    if masks:
        header["masks"] = masks
    return Stored(tensors=tensors, header=header)


def file_bytes(content: Stored) -> bytes:
    """The file, byte for byte."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.tensors.items()}
    metadata = {METADATA_KEY: json.dumps(content.header, separators=(",", ":"))}
    result: bytes = safetensors.torch.save(tensors, metadata)
    return result


def file_size(content: Stored) -> int:
    """Length of the file in bytes, also for tensors on the meta device."""
    zeros = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in content.tensors.items()}
    return len(file_bytes(Stored(tensors=zeros, header=content.header)))


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    distinct = {_identity(name, t): t for name, t in state.items() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in distinct.values())


@torch.no_grad()
def round_floats_(model: nn.Module) -> None:
    """Round every parameter and saved buffer to half precision, in which it then takes half the bytes.

    Tensors whose values half precision cannot hold stay as they are. New tensors take the place of the old ones, which
    others may share; what is shared within `model` stays so. On the meta device only the type changes.
    """
    rounded: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in (torch.float32, torch.float64):
                value = rounded.setdefault(id(parameter), nn.Parameter(_rounded(parameter), parameter.requires_grad))
                module._parameters[name] = value
        for name, buffer in module._buffers.items():
            is_saved = buffer is not None and name not in module._non_persistent_buffers_set
            if is_saved and buffer is not None and buffer.dtype in (torch.float32, torch.float64):
                module._buffers[name] = rounded.setdefault(id(buffer), _rounded(buffer))


def _rounded(value: Tensor) -> Tensor:
    return value.detach().half() if value.is_meta else storable(value.detach()).clone()


def _layer_header(layer: PQModule) -> list[Any]:
    return [type(layer).__name__, layer.block_size, layer.codebook_size, list(layer.weight_shape)]


def _identity(name: str, value: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    if value.numel() == 0 or value.is_meta:
        return (id(value.untyped_storage()._cdata), name) if value.numel() == 0 else (value.untyped_storage()._cdata,)
    return (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)


def _packed(layer: PQModule) -> Tensor:
    bits = layer.code_bits
    if layer.codes.is_meta:
        return torch.empty(-(-layer.codes.numel() * bits // 8), dtype=torch.uint8, device="meta")
    return pack(layer.codes.reshape(-1), bits)


def _narrowest(value: Tensor, *, is_codebook: bool) -> Tensor:
    """The value in the narrowest type that holds it exactly; on the meta device, codebooks count as half precision."""
    if value.is_meta:
        return value.half() if is_codebook and value.dtype in (torch.float32, torch.float64) else value
    if value.dtype in (torch.float32, torch.float64):
        half = value.half()
        return half if torch.equal(half.to(value.dtype), value) else value
    if value.dtype == torch.int64 and value.numel():
        for dtype in _INTEGERS:
            info = torch.iinfo(dtype)
            if info.min <= int(value.min()) and int(value.max()) <= info.max:
                return value.to(dtype)
    return value
