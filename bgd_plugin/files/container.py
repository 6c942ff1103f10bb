"""The container of format 3: header and tensors in one sequence of bytes, the header deflated.

A safetensors file describes each tensor in about ninety characters; in a small file these descriptions are a per cent
of it. Format 3 is still a safetensors file, with one tensor, `#content`: four bytes with the length of the deflated
header, little-endian; the header as JSON, in which `tensors` lists name, dtype and shape; the tensors' bytes one after
another in that order.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.errors import CheckpointError

__all__ = ["CONTENT", "content_length", "joined", "parted"]

CONTENT = "#content"
_MOST_INFLATED = 100
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
    )
}


def joined(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Tensor:
    """Header and tensors as bytes, uint8 `[length]`.

    Raises:
        CheckpointError: a tensor of a type that the format does not have.
    """
    head = _deflated(tensors, header)
    parts = [tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8) for name in sorted(tensors)]
    front = torch.frombuffer(bytearray(len(head).to_bytes(4, "little") + head), dtype=torch.uint8)
    return torch.cat([front, *parts])


def content_length(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """The length of `joined` in bytes; tensors, of any shape, may be on the meta device."""
    return 4 + len(_deflated(tensors, header)) + sum(t.numel() * t.element_size() for t in tensors.values())


def parted(content: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `joined`, from content uint8 `[length]`.

    Raises:
        ValueError: the bytes are damaged.
    """
    if content.dtype != torch.uint8 or content.ndim != 1:
        raise ValueError(f"its content is {content.dtype} {list(content.shape)}, not bytes")
    length = int.from_bytes(bytes(content[:4].tolist()), "little")
    header = _inflated(content[4 : 4 + length].numpy().tobytes(), length)
    entries = header.pop("tensors", None)
    if not isinstance(entries, list):
        raise ValueError("the header lists no tensors")
    tensors: dict[str, Tensor] = {}
    at = 4 + length
    for entry in entries:
        name, dtype, shape = _checked(entry)
        size = math.prod(shape) * dtype.itemsize
        if name in tensors or size > content.numel() - at:
            raise ValueError(f"tensor {name!r} of {list(shape)} has no place in the file")
        tensors[name] = content[at : at + size].clone().view(dtype).reshape(shape)
        at += size
    if at != content.numel():
        raise ValueError(f"{content.numel() - at} bytes belong to no tensor")
    return tensors, header


def _deflated(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    entries = [[name, _name(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    text = json.dumps({**header, "tensors": entries}, separators=(",", ":")).encode()
    head = zlib.compress(text, 9)
    return head if len(text) < _MOST_INFLATED // 2 * len(head) else zlib.compress(text, 0)


def _inflated(head: bytes, length: int) -> dict[str, Any]:
    """The header; it is refused where it would grow by more than a file's own ever does."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(head, _MOST_INFLATED * max(1, len(head)))
        header = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    if len(head) != length or not inflater.eof or inflater.unused_data or not isinstance(header, dict):
        raise ValueError("its header is damaged: it does not end where it should")
    return header


def _checked(entry: Any) -> tuple[str, torch.dtype, tuple[int, ...]]:
    match entry:
        case [str(name), str(dtype), [*shape]] if dtype in _DTYPES and all(_is_side(side) for side in shape):
            return name, _DTYPES[dtype], tuple(shape)
    raise ValueError(f"{entry!r} does not consist of a tensor's name, dtype and shape")


def _is_side(side: Any) -> bool:
    return type(side) is int and 0 <= side < 2**48


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"the network's state has a tensor of {dtype}, which files cannot hold")
    return name
