"""Which layers are quantized, into what, and how many bytes that takes; why the others are left alone."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from bgd_plugin.budget import Sensitivity
from bgd_plugin.config import FAMILIES, BGDConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import (
    FoundLayer,
    LeftLayer,
    baked,
    copy_module,
    find_layers,
    front_end,
    install_,
    isolate_weights_,
    module_at,
    unwrapped,
)
from bgd_plugin.nn import PQModule, freeze_norms_
from bgd_plugin.planned import Plan, PlannedLayer, SkippedLayer
from bgd_plugin.pq.masks import mask_form, pack_mask
from bgd_plugin.pq.rate import largest_codebook
from bgd_plugin.spending import Budget
from bgd_plugin.stages import LayerConfig
from bgd_plugin.storage import Stored, file_size, round_floats_, round_weights_, state_bytes, stored

__all__ = [
    "family_leftovers",
    "free_layers",
    "is_finished",
    "layers_in",
    "make_plan",
    "paper_bytes",
    "plan",
    "plan_layer",
    "require_plannable",
]

_COUNTER_BYTES = 8  # by which a batch norm's count of batches may grow in the file while the network is finetuned

_Chosen = list[tuple[FoundLayer, PlannedLayer]]


def plan(
    model: nn.Module | ExportedProgram, config: BGDConfig | None = None, *, original_bytes: int | None = None
) -> Plan:
    """What `quantize(model, ..., config)` will do, without data. The model may be on the meta device.

    Args:
        model: the float network; it is left untouched.
        config: what to quantize and how; `BGDConfig()` if not given.
        original_bytes: as in `quantize`: the bytes of the network that a chain of steps started from.

    Raises:
        ConfigError: a block size that does not divide its layer, a glob that matches nothing, no layer to quantize.
    """
    model = baked(unwrapped(model))
    network, folded = front_end(copy_module(model, share_tensors=True))
    config = config or BGDConfig()
    return make_plan(network, config, original=model, original_bytes=original_bytes, folded=folded)[0]


def make_plan(
    graph_module: nn.Module,
    config: BGDConfig,
    *,
    original: nn.Module,
    original_bytes: int | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    folded: Mapping[str, str] | None = None,
) -> tuple[Plan, list[FoundLayer]]:
    """The plan for a graph, and the found layers that it quantizes, in the same order.

    Args:
        graph_module: the network as the front end gives it.
        config: the settings.
        original: the network as it came, for its size.
        original_bytes: of the network that a chain of steps started from.
        sensitivities: of the free layers, where a budget is to be spent; None: by the weights alone.
        folded: layers whose weight something computed, and what.
    """
    chosen, skipped = _outcomes(graph_module, config, folded)
    skipped += _unreached(original, graph_module)
    _require_some(chosen, skipped, config)
    original_bytes = _chain_bytes(original, original_bytes)
    notes: tuple[str, ...] = ()
    target = config.budget_bytes(original_bytes)
    if target is not None:
        chosen, left, notes = _budget(graph_module, config, chosen, target).spend(sensitivities)
        skipped += [SkippedLayer(name=name, reason="the budget has room for it in float") for name in left]
    sketch = _sketch(graph_module, chosen)
    paper = paper_bytes(sketch)
    result = Plan(
        layers=tuple(p for _, p in chosen),
        skipped=tuple(skipped),
        original_bytes=original_bytes,
        compressed_bytes=_file_size(sketch, config, family_leftovers(graph_module, config)),
        paper_bytes=paper,
        notes=notes,
    )
    return result, [f for f, _ in chosen]


def require_plannable(
    graph_module: nn.Module, config: BGDConfig, *, original: nn.Module, original_bytes: int | None = None
) -> None:
    """Refuse what `make_plan` would refuse, without any choice.

    Raises:
        ConfigError: as `plan`.
    """
    chosen, skipped = _outcomes(graph_module, config)
    _require_some(chosen, skipped, config)
    target = config.budget_bytes(_chain_bytes(original, original_bytes))
    if target is not None:
        _budget(graph_module, config, chosen, target).require_reachable()


def _budget(graph_module: nn.Module, config: BGDConfig, chosen: _Chosen, target: int) -> Budget:
    leftovers = family_leftovers(graph_module, config)
    return Budget(
        layers=chosen,
        free=[p.name for f, p in chosen if _is_free(f, p, config)],
        target_bytes=target,
        file_size=lambda layers: _file_size(_sketch(graph_module, layers), config, leftovers),
        float_storage=config.float_storage,
        seed=config.seed,
    )


def _require_some(chosen: _Chosen, skipped: list[SkippedLayer], config: BGDConfig) -> None:
    if not chosen:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5]) or "it has no convolution and no linear layer"
        raise ConfigError(f"no layer of the network can be quantized: {reasons}")
    if config.preserve_zeros and not any(planned.mask_form for _, planned in chosen):
        raise ConfigError(
            "preserve_zeros=True, but none of the layers to be quantized has a weight that is zero: prune the network "
            "first, or leave the setting out"
        )


def free_layers(graph_module: nn.Module, config: BGDConfig) -> _Chosen:
    """The layers whose sizes a budget chooses: those without an override whose kind has the default setting."""
    return [(f, p) for f, p in _outcomes(graph_module, config)[0] if _is_free(f, p, config)]


def _is_free(layer: FoundLayer, planned: PlannedLayer, config: BGDConfig) -> bool:
    is_named = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern, _ in config.overrides)
    return not is_named and config.has_default_sizes(planned.family)


def _outcomes(
    graph_module: nn.Module, config: BGDConfig, folded: Mapping[str, str] | None = None
) -> tuple[_Chosen, list[SkippedLayer]]:
    """What the settings say to each layer: how it is quantized, or why it is not."""
    found, left = find_layers(graph_module)
    _check_globs(config, found, left)
    skipped = [SkippedLayer(name=layer.name, reason=layer.reason) for layer in left]
    chosen: _Chosen = []
    first = _first_layer(graph_module, found)
    for layer in found:
        outcome = _planned(layer, config, is_first=layer is first)
        if isinstance(outcome, PlannedLayer):
            chosen.append((layer, _with_notes(layer, outcome, folded or {})))
        else:
            skipped.append(outcome)
    return chosen, skipped


def _chain_bytes(model: nn.Module, original_bytes: int | None) -> int:
    """Bytes of the network that is compressed, or of the larger one that it was made from."""
    own = state_bytes(model.state_dict())
    if original_bytes is None:
        return own
    if not isinstance(original_bytes, int) or original_bytes < own:
        raise ConfigError(
            f"original_bytes={original_bytes!r}: the network given has {own} bytes, so the one that it was pruned from "
            "had at least as many; give that network's plan(dense).original_bytes"
        )
    return original_bytes


def layers_in(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Every layer that has a product-quantized form, whatever the settings, with its family; why the others have none.

    Returns:
        the family of `BGDConfig` by layer name, in the order in which they run; the reason by name.
    """
    found, left = find_layers(front_end(copy_module(baked(model), share_tensors=True))[0])
    return {layer.name: layer.family for layer in found}, {layer.name: layer.reason for layer in left}


def plan_layer(layer: FoundLayer, config: BGDConfig) -> PlannedLayer | SkippedLayer:
    """What the settings say to one layer by itself; it does not count as the network's first."""
    return _planned(layer, config, is_first=False)


def is_finished(graph_module: nn.Module, config: BGDConfig) -> bool:
    """Whether a graph has quantized layers, and no other one that the settings would quantize.

    With a budget, a free layer that is still float is one that the budget left so.
    """
    if not any(isinstance(module, PQModule) for module in graph_module.modules()):
        return False
    found, _ = find_layers(graph_module)
    first = _first_layer(graph_module, found)
    rest = [(layer, _planned(layer, config, is_first=layer is first)) for layer in found]
    return all(
        config.has_budget and _is_free(layer, planned, config)
        for layer, planned in rest
        if isinstance(planned, PlannedLayer)
    )


def family_leftovers(graph_module: nn.Module, config: BGDConfig) -> list[str]:
    """Names of the weights that stay float because the settings have nothing for their kind of layer.

    Layers that an override keeps float are not among them: those the user wants as they are.
    """
    found, _ = find_layers(graph_module)
    first = _first_layer(graph_module, found)
    names = []
    for layer in found:
        is_named = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern, _ in config.overrides)
        if not is_named and not layer.tied and _setting(layer, config, is_first=layer is first)[0] is None:
            names.append(layer.target if layer.functional else f"{layer.target}.weight")
    return names


def _with_notes(layer: FoundLayer, planned: PlannedLayer, folded: Mapping[str, str]) -> PlannedLayer:
    """Say what became of a weight that others share, or that something else computed."""
    notes = [planned.note] if planned.note else []
    if layer.name in folded:
        notes.append(f"{folded[layer.name]} folded into the weight")
    if layer.tied:
        notes.append(f"tied to {', '.join(layer.tied)}")
    return dataclasses.replace(planned, note="; ".join(notes))


def _first_layer(graph_module: nn.Module, found: list[FoundLayer]) -> FoundLayer | None:
    """The network's first layer, if it is still float."""
    if not isinstance(graph_module, fx.GraphModule):
        return _first_held(graph_module, found)
    for node in graph_module.graph.nodes:
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


def paper_bytes(model: nn.Module) -> int:
    """Size by the paper's accounting (arXiv 1907.05686, section 4.1), in bytes.

    `log2(k) / d` bits for each quantized weight, codebooks in half precision, every other parameter in single
    precision; masks, which the paper has none of, in the bits that they take.
    """
    layers = list({id(m.codebook): m for m in model.modules() if isinstance(m, PQModule)}.values())  # tied ones once
    codebooks = {id(layer.codebook) for layer in layers}
    bits = sum(layer.codes.numel() * layer.code_bits + 16 * layer.codebook.numel() for layer in layers)
    bits += sum(8 * pack_mask(m.mask, mask_form(m.mask)).numel() for m in layers if m.mask is not None)
    bits += sum(32 * p.numel() for p in model.parameters() if id(p) not in codebooks)
    return -(-bits // 8)


def _check_globs(config: BGDConfig, found: list[FoundLayer], left: list[LeftLayer]) -> None:
    names = [layer.name for layer in found] + [layer.name for layer in left]
    for pattern, _ in config.overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"override {pattern!r} matches no layer; the network has {_some(names)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _planned(layer: FoundLayer, config: BGDConfig, *, is_first: bool) -> PlannedLayer | SkippedLayer:
    setting, reason, adapts = _setting(layer, config, is_first=is_first)
    if setting is None:
        return SkippedLayer(name=layer.name, reason=reason)
    rows, columns = layer.rows, layer.columns
    block_size, notes = setting.block_size, []
    if columns % block_size:
        divisors = [d for d in range(1, columns + 1) if columns % d == 0]
        if not adapts:
            near = sorted(sorted(divisors, key=lambda d: abs(d - block_size))[:2])
            raise ConfigError(
                f"layer {layer.name!r}: {columns} weights per row do not divide into blocks of {block_size}; "
                f"use {' or '.join(map(str, near))}, or exclude the layer with an override ({layer.name!r}, None)"
            )
        block_size = max(d for d in divisors if d <= setting.block_size)
        notes.append(f"block {setting.block_size} → {block_size}: {columns} weights per row")
        if block_size == 1 and columns > 1:
            return SkippedLayer(name=layer.name, reason=f"{columns} weights per row do not divide into blocks")
    blocks = rows * columns // block_size
    codebook_size = min(setting.codebook_size, largest_codebook(blocks))
    if codebook_size < 2:
        return SkippedLayer(name=layer.name, reason=f"only {blocks} blocks, too few for a codebook")
    if codebook_size < setting.codebook_size:
        notes.append(f"codebook {setting.codebook_size} → {codebook_size}: {blocks} blocks")
    form, mask_bytes = _stored_mask(layer) if config.preserve_zeros else ("", 0)
    if form:
        notes.append(f"zeros: {form}, {8 * mask_bytes / (rows * columns):.2f} bits/weight")
    return PlannedLayer(
        name=layer.name,
        target=layer.target,
        kind=layer.kind,
        family=layer.family,
        weight_shape=tuple(layer.matrix.shape),
        block_size=block_size,
        codebook_size=codebook_size,
        calls=layer.calls,
        mask_form=form,
        mask_bytes=mask_bytes,
        codebook_storage=_codebook_storage(layer.weight, config, form),
        note="; ".join(notes),
    )


def _stored_mask(layer: FoundLayer) -> tuple[str, int]:
    """Form and bytes of a layer's zeros; "" and 0 if it has none."""
    if layer.weight.is_meta:
        raise ConfigError(
            f"layer {layer.name!r}: preserve_zeros=True, and its weight is on the meta device, where no value is zero: "
            "give the network with its weights"
        )
    mask = layer.matrix.detach() != 0
    if bool(mask.all()):
        return "", 0
    form = mask_form(mask)
    return form, pack_mask(mask, form).numel()


def _setting(layer: FoundLayer, config: BGDConfig, *, is_first: bool) -> tuple[LayerConfig | None, str, bool]:
    """The setting that applies, the reason if there is none, and whether its block size may give way."""
    for pattern, setting in config.overrides:
        if fnmatch.fnmatchcase(layer.name, pattern):
            return setting, f"override {pattern!r}", False
    family = "first_layer" if is_first else layer.family
    assert family in FAMILIES
    setting = getattr(config, family)
    tied = f" (tied to {', '.join(layer.tied)})" if layer.tied and family == "embedding" else ""
    return setting, f"{family}=None{tied}", config.is_default(family)


def _unreached(original: nn.Module, graph_module: nn.Module) -> list[SkippedLayer]:
    """Weights of the network that its graph in evaluation mode never uses."""
    used = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    return [
        SkippedLayer(name=name, reason="not used in evaluation mode: not part of the compressed network")
        for name, p in original.named_parameters()
        if p.ndim > 1 and name not in used
    ]


def _file_size(sketch: nn.Module, config: BGDConfig, leftovers: list[str]) -> int:
    """Length of a sketch's file; what stays float in it is rounded as the settings say.

    With a budget it is the length that the file may come to: the work ahead changes statistics and biases, and then a
    narrow type may hold them no more.
    """
    if config.freeze_norms:
        freeze_norms_(sketch)
    round_weights_(sketch, leftovers, config.weight_storage)
    if config.float_storage == "float16":
        round_floats_(sketch)
    if not config.has_budget:
        return file_size(stored(sketch))
    content = stored(sketch)
    whole = sketch.state_dict()
    changing = {name for name, value in whole.items() if _may_change(name, value) and config.float_storage == "float32"}
    tensors = {name: whole[name].to("meta") if name in changing else tensor for name, tensor in content.tensors.items()}
    counters = sum(not t.is_floating_point() and t.ndim == 0 for t in whole.values())
    reserve = _COUNTER_BYTES * counters if config.finetuning else 0
    return file_size(Stored(tensors=tensors, header=content.header)) + reserve


def _may_change(name: str, value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim == 1 and not name.endswith(".codebook")


def _sketch(graph_module: nn.Module, chosen: list[tuple[FoundLayer, PlannedLayer]]) -> nn.Module:
    """The compressed network with empty codebooks and codes, for its sizes alone."""
    sketch: nn.Module = copy_module(graph_module, share_tensors=True)
    isolate_weights_(sketch, [found for found, _ in chosen])
    for found, planned in chosen:
        dtype = torch.int8 if planned.codebook_storage == "int8" else found.weight.dtype
        codebook = torch.empty(planned.codebook_size, planned.block_size, dtype=dtype, device="meta")
        codes = torch.empty(planned.rows, planned.blocks_per_row, dtype=torch.int64, device="meta")
        install_(sketch, found, codebook, codes, planned.kept(found.matrix))
    return sketch


def _codebook_storage(weight: Tensor, config: BGDConfig, mask_form: str) -> str:
    """8 bits are for single precision; beside a mask they might add zeros of their own."""
    is_int8 = config.codebook_storage == "int8" and weight.dtype == torch.float32 and not mask_form
    return "int8" if is_int8 else "float16"
