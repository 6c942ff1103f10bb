"""Which layers are quantized, into what, and how many bytes that takes; why the others are left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from torch import nn
from torch.export import ExportedProgram

from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.format import state_bytes
from bgd_plugin.graph import FoundLayer, LeftLayer, baked, copy_module, find_layers, front_end, isolated, unwrapped
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.candidates import Sensitivity
from bgd_plugin.planning.rules import decided, first_layer, setting_of, with_notes
from bgd_plugin.planning.sizes import paper_bytes, sketched, sketched_file_size
from bgd_plugin.planning.types import Plan, PlannedLayer, SkippedLayer

__all__ = [
    "family_leftovers",
    "free_layers",
    "is_finished",
    "layers_in",
    "make_plan",
    "plan",
    "plan_layer",
    "require_plannable",
]

_Chosen = list[tuple[FoundLayer, PlannedLayer]]


@isolated
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
    sketch = sketched(graph_module, chosen)
    paper = paper_bytes(sketch)
    result = Plan(
        layers=tuple(p for _, p in chosen),
        skipped=tuple(skipped),
        original_bytes=original_bytes,
        compressed_bytes=sketched_file_size(sketch, config, family_leftovers(graph_module, config)),
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
        file_size=lambda layers: sketched_file_size(sketched(graph_module, layers), config, leftovers),
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
    first = first_layer(graph_module, found)
    for layer in found:
        outcome = decided(layer, config, is_first=layer is first)
        if isinstance(outcome, PlannedLayer):
            chosen.append((layer, with_notes(layer, outcome, folded or {})))
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
    return decided(layer, config, is_first=False)


def is_finished(graph_module: nn.Module, config: BGDConfig) -> bool:
    """Whether a graph has quantized layers, and no other one that the settings would quantize.

    With a budget, a free layer that is still float is one that the budget left so.
    """
    if not any(isinstance(module, PQModule) for module in graph_module.modules()):
        return False
    found, _ = find_layers(graph_module)
    first = first_layer(graph_module, found)
    rest = [(layer, decided(layer, config, is_first=layer is first)) for layer in found]
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
    first = first_layer(graph_module, found)
    names = []
    for layer in found:
        is_named = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern, _ in config.overrides)
        if not is_named and not layer.tied and setting_of(layer, config, is_first=layer is first)[0] is None:
            names.append(layer.target if layer.functional else f"{layer.target}.weight")
    return names


def _check_globs(config: BGDConfig, found: list[FoundLayer], left: list[LeftLayer]) -> None:
    names = [layer.name for layer in found] + [layer.name for layer in left]
    for pattern, _ in config.overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"override {pattern!r} matches no layer; the network has {_some(names)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _unreached(original: nn.Module, graph_module: nn.Module) -> list[SkippedLayer]:
    """Weights of the network that its graph in evaluation mode never uses."""
    used = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    return [
        SkippedLayer(name=name, reason="not used in evaluation mode: not part of the compressed network")
        for name, p in original.named_parameters()
        if p.ndim > 1 and name not in used
    ]
