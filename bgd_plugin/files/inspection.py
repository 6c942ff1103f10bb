"""Inspect a compressed file without the network: layers, and the bytes of each part."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.compact import FILE_BYTES
from bgd_plugin.files.save import read_file
from bgd_plugin.support.tables import mib, table

__all__ = ["inspected", "inspection_text"]


def inspected(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The layers and byte counts of the file at `path`, as plain values.

    `parts_bytes` sums to `file_bytes`; its `float` is everything that is not quantized, its `header` names, shapes and
    types.

    Raises:
        CheckpointError: as `bgd_plugin.load`, as far as can be checked without the network.
    """
    tensors, header = read_file(path)
    sizes = {name: _bytes(tensor) for name, tensor in tensors.items()} | header.get(FILE_BYTES, {})
    try:
        masks = header.get("masks", {})
        layers = [_layer(name, entry, sizes, masks.get(name)) for name, entry in header.get("layers", {}).items()]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: the layers in its header are damaged ({error!r})") from error
    quantized = {f"{layer['name']}.{part}" for layer in layers for part in ("codes", "codebook", "mask")}
    others: list[dict[str, Any]] = [
        {"name": name, "shape": list(t.shape), "dtype": _dtype(t), "bytes": sizes[name]}
        for name, t in sorted(tensors.items())
        if name not in quantized
    ]
    total = Path(path).stat().st_size
    parts = {
        "codes": sum(layer["codes_bytes"] for layer in layers),
        "codebooks": sum(layer["codebook_bytes"] for layer in layers),
        "masks": sum(layer["mask_bytes"] for layer in layers),
        "float": sum(other["bytes"] for other in others),
    }
    parts["header"] = total - sum(parts.values())
    return {
        "file": str(path),
        "format": header["format"],
        "file_bytes": total,
        "parts_bytes": parts,
        "layers": layers,
        "others": others,
        "aliases": header.get("aliases", {}),
    }


def inspection_text(content: dict[str, Any]) -> str:
    """The content of a file, as `inspected` returns it, as readable text."""
    rows = [
        [x["name"], x["kind"], "×".join(map(str, x["weight_shape"])), x["block_size"]]
        + [x["codebook_size"] if x["codes"] == "blocks" else x["codes"]]
        + [f"{x['bits_per_weight']:.2f}", mib(x["codes_bytes"]), mib(x["codebook_bytes"])]
        + [f"{x['mask']}, {mib(x['mask_bytes'])}" if x["mask"] else ""]
        for x in content["layers"]
    ]
    total = content["file_bytes"]
    parts = [[name, mib(size), f"{size / total:.1%}"] for name, size in content["parts_bytes"].items()]
    what = [f"{content['file']}: format {content['format']}, {mib(total)} ({total:,} bytes)"]
    what += [f"{len(rows)} quantized layers, {len(content['others'])} other tensors"]
    return "\n".join(
        [
            *what,
            "",
            table(
                ["layer", "kind", "weight", "block", "codebook", "bits/weight", "codes", "codebook size", "zeros"], rows
            ),
            "",
            table(["part", "size", "share"], [*parts, ["whole file", mib(total), "100.0%"]]),
        ]
    )


def _layer(name: str, entry: Any, sizes: dict[str, int], mask: str | None) -> dict[str, Any]:
    match entry:
        case [str(kind), int(block_size), int(codebook_size), [*shape], *form] if all(
            type(side) is int for side in shape
        ) and form in ([], ["trellis"]):
            pass
        case _:
            raise ValueError(f"the entry of {name!r} does not consist of kind, sizes, shape and form of codes")
    if not all(0 < side < 2**63 for side in (block_size, codebook_size, *shape)):
        raise ValueError(f"the sizes of {name!r} are out of range")
    codes, codebook = sizes[f"{name}.codes"], sizes[f"{name}.codebook"]
    mask_bytes = 0 if mask is None else sizes[f"{name}.mask"]
    return {
        "name": name,
        "kind": kind,
        "weight_shape": shape,
        "block_size": block_size,
        "codebook_size": codebook_size,
        "codes": form[0] if form else "blocks",
        "bits_per_weight": 8 * (codes + codebook + mask_bytes) / math.prod(shape),
        "codes_bytes": codes,
        "codebook_bytes": codebook,
        "mask": mask or "",
        "mask_bytes": mask_bytes,
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
