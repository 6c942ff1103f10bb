"""Save compressed networks, and read their files: one safetensors file, no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.compact import expanded
from bgd_plugin.files.container import CONTENT, parted
from bgd_plugin.files.content import content_of
from bgd_plugin.files.format import FORMAT_VERSION, METADATA_KEY, Stored, file_bytes
from bgd_plugin.graph import copy_module, isolated, materialize_, unwrapped
from bgd_plugin.nn import PQModule
from bgd_plugin.support.atomic import write_atomically

__all__ = ["materialize", "read_file", "save"]

_CONTAINED = 3
"""The first format with a header of its own inside."""
_HEADER_ENTRIES = (
    ("layers", dict),
    ("frozen", list),
    ("scaled", list),
    ("numbers", dict),
    ("aliases", dict),
    ("dtypes", dict),
    ("masks", dict),
    ("attributes", dict),
    ("marks", dict),
    ("rotated", dict),
)


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a compressed network to one safetensors file.

    The file is written atomically: if anything fails, an existing file is unchanged.

    Args:
        model: a network with product-quantized layers; `DataParallel`, `DistributedDataParallel` and `torch.compile`
            wrappers are removed.
        path: the file to write; its folder must exist.

    Returns:
        the file's length in bytes.

    Raises:
        CheckpointError: the network has no product-quantized layer, its state contains something other than tensors,
            or the file cannot be written.
    """
    model = unwrapped(model)
    if not any(isinstance(module, PQModule) for module in model.modules()):
        raise CheckpointError(
            "the network has no product-quantized layer: save the .model that bgd_plugin.quantize returns"
        )
    if not Path(path).parent.is_dir():
        raise CheckpointError(f"{path}: the folder {Path(path).parent} does not exist: create it first")
    content = file_bytes(content_of(model))
    write_atomically(Path(path), content)
    return len(content)


@isolated
def materialize(model: nn.Module) -> nn.Module:
    """Replace every product-quantized module by an ordinary one with the decoded weight, in a copy.

    Args:
        model: a compressed network; never changed.

    Returns:
        the copy, which has the same outputs and no codes.

    Raises:
        ConfigError: `model` is no network.
    """
    return materialize_(copy_module(unwrapped(model)))


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The raw tensors and the header of a file.

    Args:
        path: a file written by `save`.

    Returns:
        tensors by name, in the shapes and types in which they are stored, and the header as plain JSON values.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or written by a newer version.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: file not found")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}): it is truncated, damaged or of another format"
        ) from error
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not written by bgd_plugin.save")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error})") from error
    _check_header(header, path)
    is_contained = header["format"] == _CONTAINED or (header["format"] > _CONTAINED and CONTENT in tensors)
    if not is_contained:
        return tensors, header
    try:
        inside, inner_header = parted(tensors[CONTENT])
        content = expanded(Stored(tensors=inside, header=inner_header))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    _check_header(content.header, path)
    return content.tensors, content.header


def _check_header(header: Any, path: Any) -> None:
    """Check structure and version; the entries are checked later, against the network."""
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path}: the header is damaged: it has no format version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}, but this version reads up to {FORMAT_VERSION}: upgrade bgd-plugin"
        )
    for name, kind in _HEADER_ENTRIES:
        if not isinstance(header.get(name, kind()), kind):
            raise CheckpointError(f"{path}: {name!r} in the header is damaged")
