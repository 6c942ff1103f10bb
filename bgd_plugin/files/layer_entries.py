"""What a file's header says of each quantized layer: written from a module, read and checked against a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.graph import FoundLayer, install_
from bgd_plugin.nn import PQModule
from bgd_plugin.pq.forms import BLOCKS, FORMS, TRELLIS, Sizes
from bgd_plugin.pq.windows import LEAST_ROWS

__all__ = ["checked_layers", "install_empty_", "layer_header"]


def layer_header(layer: PQModule) -> list[Any]:
    """What the header says of a layer: its class, block size, codebook size, weight's shape, and form if not blocks."""
    form = [] if layer.has_blocks else [layer.form.name]
    return [type(layer).__name__, layer.block_size, layer.codebook_size, list(layer.weight_shape), *form]


def checked_layers(
    header: dict[str, Any], tensors: dict[str, Tensor], found: dict[str, FoundLayer], problems: list[str]
) -> dict[str, tuple[str, int, int]]:
    """Form of codes, block and codebook size of each layer in a file; mismatches are appended to `problems`.

    Args:
        header, tensors: of the file.
        found: the layers of the network, by path.
        problems: in words.
    """
    layers: dict[str, tuple[str, int, int]] = {}
    for target, entry in header.get("layers", {}).items():
        if target not in found:
            problems.append(f"layer {target!r} is in the file; the network has no such convolution or linear layer")
            continue
        shape = list(found[target].weight.shape)
        codebook = tensors.get(f"{target}.codebook")
        match entry:
            case [str(), int(), int(), list(saved), *_] if saved != shape:
                problems.append(f"layer {target!r}: weight {saved} in the file, {shape} in the network")
            case [str(), int(d), int(k), list()] if (
                codebook is not None and list(codebook.shape) == [k, d] and d and k > 1
            ):
                if found[target].columns % d:
                    problems.append(f"layer {target!r}: blocks of {d} do not divide its rows")
                layers[target] = (BLOCKS, d, k)
            case [str(), int(d), int(k), list(), "trellis"] if (
                codebook is not None and codebook.ndim == 1 and (d, k) == FORMS[TRELLIS].sizes(codebook.shape)
            ):
                if found[target].rows != len(codebook) or len(codebook) < LEAST_ROWS:
                    problems.append(f"layer {target!r}: its codebook has {len(codebook)} rows, the layer others")
                layers[target] = (TRELLIS, d, k)
            case _:
                problems.append(f"layer {target!r}: its entry or its codebook is damaged or missing")
    problems += [
        f"the mask of {target!r} is in the file; it has no such quantized layer"
        for target in header.get("masks", {})
        if target not in header.get("layers", {})
    ]
    return layers


def install_empty_(
    network: nn.Module, layer: FoundLayer, form: str, block_and_codebook: Sequence[int], *, masked: bool
) -> None:
    """Insert the modules that receive a file's codebooks and codes; they have shapes and types only.

    Args:
        network: changed in place.
        layer: as found in it.
        form: of the codes.
        block_and_codebook: the two sizes.
        masked: whether zeros are preserved.
    """
    block_size, codebook_size = block_and_codebook
    sizes = Sizes(rows=layer.rows, columns=layer.columns, block_size=block_size, codebook_size=codebook_size)
    codebook, codes = FORMS[form].empty(sizes, dtype=layer.weight.dtype, device="meta")
    mask = torch.empty(layer.matrix.shape, dtype=torch.bool, device="meta") if masked else None
    for module in install_(network, layer, codebook, codes, mask, form):
        module.codebook.requires_grad_(layer.weight.requires_grad)
