"""The file format: which tensors a file has, in which types, and its header. Sizes are exact, computed from the format.

A file is a safetensors file. Codes are packed to `log2(codebook_size)` bits, and masks as in `encoding.masks`. Every
other tensor is stored in the narrowest type that represents its values *exactly*, so reading it back loses nothing:
half precision, or 8-bit integers for codebooks and weights on an 8-bit grid, whose scales are all in one tensor. Shared
tensors are stored once, and scalar integers are in the header.

That is format 2. Format 3 holds the same in fewer bytes (`files.compact`, `files.container`). Format 4 is either of
them with trellis codes in some layers, whose entries in the header then name the form (`pq.forms`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bgd_plugin.encoding.codes import pack
from bgd_plugin.encoding.eight_bit import from_eight_bits
from bgd_plugin.encoding.masks import mask_form, pack_mask
from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.attributes import fingerprint, other_tensors
from bgd_plugin.files.compact import compacted
from bgd_plugin.files.container import CONTENT, content_length, joined
from bgd_plugin.files.layer_entries import layer_header
from bgd_plugin.files.rotated import rotated_in
from bgd_plugin.files.rounding import eight_bit_rows
from bgd_plugin.files.same_tensor import identity
from bgd_plugin.files.stored import Stored
from bgd_plugin.nn import FrozenNorm, PQModule

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "State",
    "Stored",
    "file_bytes",
    "file_size",
    "narrowest",
    "packed_size",
    "restored",
    "scales",
    "stored",
    "stored_state",
]

FORMAT_VERSION = 4
"""The newest one. A file is written in the oldest that can hold it."""
_PACKED, _COMPACT, _WITH_FORMS = 2, 3, 4
METADATA_KEY = "bgd_plugin"
SCALES = "#scales"

_INTEGERS = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True, kw_only=True)
class State:
    """The part of a network that goes into its file.

    Attributes:
        tensors: the state dict, and the tensors of `attributes`.
        layers: the product-quantized modules by path; a shared module appears under each of its paths.
        frozen: paths of the frozen norms.
        attributes: names and types of tensors that are in no state dict, and are stored all the same.
        marks: fingerprints of others, which are not.
        rotated: width of each norm that has a matrix behind it, by path.
        stream_bytes: of layers whose codes are yet to be coded, the bytes of their streams.
    """

    tensors: dict[str, Any]
    layers: dict[str, PQModule]
    frozen: tuple[str, ...]
    attributes: dict[str, str] = field(default_factory=dict)
    marks: dict[str, list[Any]] = field(default_factory=dict)
    rotated: dict[str, int] = field(default_factory=dict)
    stream_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """The current state of a network."""
        modules = dict(model.named_modules(remove_duplicate=False))
        whole, marked = other_tensors(model)
        return cls(
            tensors=model.state_dict() | whole,
            layers={path: module for path, module in modules.items() if isinstance(module, PQModule)},
            frozen=tuple(path for path, module in modules.items() if isinstance(module, FrozenNorm)),
            attributes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in whole.items()},
            marks={name: fingerprint(tensor) for name, tensor in marked.items()},
            rotated=rotated_in(model),
        )


def stored(model: nn.Module) -> Stored:
    """The tensors and the header of a network's file; see `stored_state`."""
    return stored_state(State.of(model))


def stored_state(state: State) -> Stored:
    """The tensors and the header of a file.

    Raises:
        CheckpointError: the state contains something other than tensors.
    """
    parts = _Parts(state)
    names: dict[tuple[Any, ...], str] = {}
    for name, value in state.tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name!r} in the network's state is a {type(value).__name__}, not a tensor, and cannot be saved"
            )
        first = names.setdefault(identity(name, value), name)
        if first != name:
            parts.aliases[name] = first
        else:
            parts.add(name, value)
    if parts.scales:
        parts.tensors[SCALES] = torch.cat(list(parts.scales.values()))
    entries = {
        "frozen": list(state.frozen),
        "scaled": list(parts.scales),
        "numbers": parts.numbers,
        "aliases": parts.aliases,
        "dtypes": parts.dtypes,
        "masks": parts.masks,
        "attributes": state.attributes,
        "marks": state.marks,
        "rotated": state.rotated,
    }
    header: dict[str, Any] = {
        "format": _PACKED if all(layer.has_blocks for layer in state.layers.values()) else _WITH_FORMS,
        "layers": {
            path: layer_header(layer) for path, layer in state.layers.items() if f"{path}.codes" in parts.tensors
        },
    }
    header |= {name: entry for name, entry in entries.items() if entry}
    return Stored(tensors=parts.tensors, header=header, columns=parts.columns, streams=tuple(parts.streams))


class _Parts:
    """Collects a network's state, tensor by tensor, in its stored form."""

    def __init__(self, state: State) -> None:
        self._layers = state.layers
        self._planned = state.stream_bytes
        self.tensors: dict[str, Tensor] = {}
        self.columns: dict[str, int] = {}
        self.streams: list[str] = []
        self.scales: dict[str, Tensor] = {}
        self.numbers: dict[str, int] = {}
        self.aliases: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.masks: dict[str, str] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Put a tensor where it belongs."""
        path, _, attribute = name.rpartition(".")
        layer = self._layers.get(path)
        if layer is not None and attribute == "codes" and path in self._planned:
            self.tensors[name] = torch.empty(self._planned[path], dtype=torch.uint8, device="meta")
            self.streams.append(name)
        elif layer is not None and attribute == "codes":
            self.tensors[name] = _packed(layer)
            if layer.has_blocks:  # others are never entropy coded
                self.columns[name] = layer.codes.shape[1]
        elif layer is not None and attribute == "mask":
            self.masks[path] = mask_form(value)
            self.tensors[name] = pack_mask(value, self.masks[path])
        elif value.dtype == torch.int64 and value.ndim == 0:
            self.numbers[name] = 0 if value.is_meta else int(value)
        else:
            self._add_values(name, value, layer if attribute == "codebook" else None)

    def _add_values(self, name: str, value: Tensor, codebook_of: PQModule | None) -> None:
        is_codebook = codebook_of is not None
        grid = eight_bit_rows(value, is_codebook=is_codebook) if codebook_of is None or codebook_of.has_blocks else None
        if grid is not None:
            self.tensors[name], self.scales[name] = grid
            return
        self.tensors[name] = narrowest(value, is_codebook=is_codebook)
        if self.tensors[name].dtype != value.dtype and value.dtype not in (torch.float32, torch.int64):
            self.dtypes[name] = str(value.dtype).removeprefix("torch.")


def restored(content: Stored) -> dict[str, Tensor]:
    """The tensors of a file with 8-bit values and scalars from the header restored.

    Codes stay packed and half precision stays half precision: their final types depend on the network.

    Raises:
        ValueError: scales or scalars do not fit the tensors.
    """
    tensors, header = dict(content.tensors), content.header
    factors, names = tensors.pop(SCALES, torch.empty(0, dtype=torch.float32)), header.get("scaled", [])
    if factors.dtype != torch.float32 or factors.ndim != 1 or not bool(torch.isfinite(factors).all()):
        raise ValueError("the scales are not a one-dimensional tensor of finite numbers")
    for name in names:
        value = tensors.get(name) if isinstance(name, str) else None
        if value is None or value.dtype != torch.int8 or not value.numel():
            raise ValueError(f"{name!r} is listed as 8-bit, but is not int8")
        rows = _grid_rows(content, name)
        if rows > len(factors):
            raise ValueError("there are too few scales")
        tensors[name] = from_eight_bits(value.reshape(rows, -1), factors[:rows]).reshape(value.shape)
        factors = factors[rows:]
    if len(factors):
        raise ValueError(f"there are {len(factors)} scales too many")
    for name, number in header.get("numbers", {}).items():
        if not isinstance(number, int) or abs(number) >= 2**63 or name in tensors:
            raise ValueError(f"{name!r} is both a tensor and a scalar in the header")
        tensors[name] = torch.tensor(number, dtype=torch.int64)
    return tensors


def scales(content: Stored) -> dict[str, Tensor]:
    """The scales of each 8-bit tensor, float32 `[rows]`: one per codebook, one per row of a weight.

    Args:
        content: the result of `stored`.
    """
    names = content.header.get("scaled", [])
    parts = torch.split(content.tensors.get(SCALES, torch.empty(0)), [_grid_rows(content, name) for name in names])
    return dict(zip(names, parts, strict=True))


def _grid_rows(content: Stored, name: str) -> int:
    """The number of 8-bit grids (scales) of a tensor."""
    path, _, attribute = name.rpartition(".")
    return 1 if attribute == "codebook" and path in content.header.get("layers", {}) else len(content.tensors[name])


def file_bytes(content: Stored) -> bytes:
    """The bytes of the file: in format 3 where its codes are worth coding, else in format 2."""
    compact = compacted(content)
    if compact is not None:
        return _safetensors({CONTENT: joined(compact.tensors, compact.header)}, _outer(content))
    return _safetensors(content.tensors, content.header)


def file_size(content: Stored) -> int:
    """Length of the file in bytes; where tensors are on the meta device, perhaps a little more than that."""
    if not any(tensor.is_meta for tensor in content.tensors.values()):
        return len(file_bytes(content))
    tensors, header, compact = content.tensors, content.header, compacted(content, exact=False)
    if compact is not None:
        length = content_length(compact.tensors, compact.header)
        tensors, header = {CONTENT: torch.empty(length, dtype=torch.uint8)}, _outer(content)
    return len(_safetensors({name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}, header))


def _outer(content: Stored) -> dict[str, int]:
    """The header outside of a content that is compact."""
    return {"format": max(_COMPACT, content.header["format"])}


def packed_size(content: Stored) -> int:
    """Length that the file would have with its codes packed, without entropy-coded streams."""
    return len(_safetensors(content.tensors, content.header))


def _safetensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    held = {name: _on_its_own(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: json.dumps(header, separators=(",", ":"))}
    result: bytes = safetensors.torch.save(held, metadata)
    return result


def _on_its_own(tensor: Tensor) -> Tensor:
    """The tensor with no more memory than it needs: views of one memory are stored as separate tensors."""
    needed = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == needed else tensor.clone()


def _packed(layer: PQModule) -> Tensor:
    bits = layer.code_bits
    if layer.codes.is_meta:
        return torch.empty(-(-layer.codes.numel() * bits // 8), dtype=torch.uint8, device="meta")
    return pack(layer.codes.reshape(-1), bits)


def narrowest(value: Tensor, *, is_codebook: bool) -> Tensor:
    """The value, of any shape, in the narrowest exact dtype; on the meta device, half precision if `is_codebook`."""
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
