"""Apply the settings to one layer: how it is quantized, or why it stays float."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from bgd_plugin.config import FAMILIES, BGDConfig, LayerConfig
from bgd_plugin.encoding.masks import mask_form, pack_mask
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import FoundLayer, looks_rows_up, module_at
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.types import PlannedLayer, SkippedLayer
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.pq.rate import largest_codebook
from bgd_plugin.pq.windows import LEAST_ROWS, STATES

__all__ = ["decided", "first_layer", "setting_of", "with_notes"]


def decided(layer: FoundLayer, config: BGDConfig, *, is_first: bool) -> PlannedLayer | SkippedLayer:
    """How a layer is quantized, or why it is not.

    Args:
        layer: the layer as found in the network.
        config: the settings.
        is_first: whether it is the network's first layer, which has a setting of its own.

    Raises:
        ConfigError: a block size of the user's that does not divide the layer; zeros to be kept that are not known.
    """
    setting, reason, adapts = setting_of(layer, config, is_first=is_first)
    if setting is None:
        return SkippedLayer(name=layer.name, reason=reason)
    rows, columns = layer.rows, layer.columns
    if not rows * columns:
        return SkippedLayer(name=layer.name, reason="it has no weights")
    if setting.codes == TRELLIS:
        return _of_windows(layer, config)
    wanted, most = config.sizes(setting, layer.family)
    notes = []
    block_size = _dividing(layer, wanted, adapts=adapts or setting.block_size is None)
    if block_size != wanted:
        notes.append(f"block {wanted} → {block_size}: {columns} weights per row")
        if block_size == 1 and columns > 1:
            return SkippedLayer(name=layer.name, reason=f"{columns} weights per row do not divide into blocks")
    blocks = rows * columns // block_size
    codebook_size = min(most, largest_codebook(blocks, wanted))
    if codebook_size < 2:
        return SkippedLayer(name=layer.name, reason=f"only {blocks} blocks, too few for a codebook")
    if codebook_size < most:
        notes.append(f"codebook {most} → {codebook_size}: {blocks} blocks")
    return _planned(layer, config, (block_size, codebook_size), notes)


def _of_windows(layer: FoundLayer, config: BGDConfig) -> PlannedLayer | SkippedLayer:
    """A layer with trellis codes, or why it cannot have them."""
    if layer.rows < LEAST_ROWS:
        reason = f"{layer.rows} rows, too few for trellis codes, which need {LEAST_ROWS}: blocks can take it"
        return SkippedLayer(name=layer.name, reason=reason)
    return _planned(layer, config, (1, STATES), [], TRELLIS)


def _planned(
    layer: FoundLayer, config: BGDConfig, sizes: tuple[int, int], notes: list[str], codes: str = "blocks"
) -> PlannedLayer:
    """A layer of some block and codebook size, and of some form of codes, with the mask that it keeps."""
    form, mask_bytes = _stored_mask(layer) if config.preserve_zeros else ("", 0)
    if form:
        notes = [*notes, f"zeros: {form}, {8 * mask_bytes / (layer.rows * layer.columns):.2f} bits/weight"]
    return PlannedLayer(
        name=layer.name,
        target=layer.target,
        kind=layer.kind,
        family=layer.family,
        weight_shape=tuple(layer.matrix.shape),
        block_size=sizes[0],
        codebook_size=sizes[1],
        calls=layer.calls,
        mask_form=form,
        mask_bytes=mask_bytes,
        note="; ".join(notes),
        codebook_storage="float16" if codes == TRELLIS else _codebook_storage(layer.weight, config, form),
        codes=codes,
    )


def _dividing(layer: FoundLayer, block_size: int, *, adapts: bool) -> int:
    """The block size, or where it may give way the next smaller one that divides the layer's rows."""
    columns = layer.columns
    if columns % block_size == 0:
        return block_size
    divisors = [d for d in range(1, columns + 1) if columns % d == 0]
    if adapts:
        return max(d for d in divisors if d <= block_size)
    near = sorted(sorted(divisors, key=lambda d: abs(d - block_size))[:2])
    raise ConfigError(
        f"layer {layer.name!r}: {columns} weights per row do not divide into blocks of {block_size}; "
        f"use {' or '.join(map(str, near))}, or exclude the layer with an override ({layer.name!r}, None)"
    )


def setting_of(layer: FoundLayer, config: BGDConfig, *, is_first: bool) -> tuple[LayerConfig | None, str, bool]:
    """The setting that applies, the reason if there is none, and whether its block size may be adjusted to the row.

    Args:
        layer: the layer as found in the network.
        config: the settings.
        is_first: whether it is the network's first layer, which has a setting of its own.
    """
    for pattern, setting in config.overrides:
        if fnmatch.fnmatchcase(layer.name, pattern):
            return setting, f"override {pattern!r}", False
    family = "first_layer" if is_first else layer.family
    assert family in FAMILIES
    setting = config.setting_for(family)
    tied = f" (tied to {', '.join(layer.tied)})" if layer.tied and family == "embedding" else ""
    return setting, f"{family}=None{tied}", config.is_default(family)


def with_notes(layer: FoundLayer, planned: PlannedLayer, folded: Mapping[str, str]) -> PlannedLayer:
    """Add notes to a layer's plan: what was `folded` into its weight (by name), and the layers tied to it."""
    notes = [planned.note] if planned.note else []
    if layer.name in folded:
        notes.append(f"{folded[layer.name]} folded into the weight")
    if layer.tied:
        notes.append(f"tied to {', '.join(layer.tied)}")
    return dataclasses.replace(planned, note="; ".join(notes))


def first_layer(graph_module: nn.Module, found: list[FoundLayer]) -> FoundLayer | None:
    """The network's first layer, among those found, if it is still float."""
    if not isinstance(graph_module, fx.GraphModule):
        return _first_held(graph_module, found)
    for node in graph_module.graph.nodes:
        if looks_rows_up(node):
            return None
        if node.op == "call_module" and isinstance(module_at(graph_module, str(node.target)), (PQModule, nn.Embedding)):
            return None
        if found and node.name == found[0].calls[0]:
            return found[0]
    return None


def _first_held(network: nn.Module, found: list[FoundLayer]) -> FoundLayer | None:
    """The first layer that a network holds, if it is float; after an embedding none reads the input."""
    targets = {layer.name: layer for layer in found}
    for path, module in network.named_modules():
        if isinstance(module, (PQModule, nn.Embedding)):
            return None
        if path in targets:
            return targets[path]
    return None


def _stored_mask(layer: FoundLayer) -> tuple[str, int]:
    """Form and bytes of a layer's zeros; "" and 0 if it has none."""
    if layer.weight.is_meta:
        raise ConfigError(
            f"layer {layer.name!r}: preserve_zeros=True, but its weight is on the meta device and has no values: "
            "give the network with its weights"
        )
    mask = layer.matrix.detach() != 0
    if bool(mask.all()):
        return "", 0
    form = mask_form(mask)
    return form, pack_mask(mask, form).numel()


def _codebook_storage(weight: Tensor, config: BGDConfig, mask_form: str) -> str:
    """8 bits are for single precision; beside a mask they might add zeros of their own."""
    is_int8 = config.codebook_storage == "int8" and weight.dtype == torch.float32 and not mask_form
    return "int8" if is_int8 else "float16"
