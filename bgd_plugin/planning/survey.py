"""The survey: the layers of a network and how the settings treat each of them, found once and kept in one frozen value.

Plan, sizes, budget, fit and report are made from it; none of them searches for layers again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bgd_plugin.config import BGDConfig, LayerConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.graph import FoundLayer, Front, LeftLayer, find_layers
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.layer_settings import decided, first_layer, setting_of, with_notes
from bgd_plugin.planning.types import CurvePoint, PlannedLayer, SkippedLayer
from bgd_plugin.planning.unused import unused_bytes, unused_note, unused_parts, unused_weights

__all__ = ["Chosen", "Survey", "is_finished", "surveyed", "weight_name"]

Chosen = tuple[tuple[FoundLayer, PlannedLayer], ...]
"""The layers to be quantized, and how each one is, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The layers of a network under some settings.

    Attributes:
        network: the form in which layers are found and fitted.
        own: the network in which they end up (see `Front`).
        config: the settings.
        chosen: the layers to be quantized.
        skipped: the layers that stay float, with reasons.
        free: by name, the settings of the chosen layers whose sizes a bound or a budget may choose.
        leftovers: names of the weights that stay float and take 8 bits (`weight_storage`): those whose kind of layer
            has no setting, not those kept float by an override; and those for which a bound or a budget chose it.
        beside: the layers of the first of these.
        halves: those of `leftovers` that take half precision instead, since a bound or a budget chose it.
        tables: names of parameters that are never rounded, since they are no weights: those that are not trained where
            most of the network is.
        original_bytes: bytes of the user's network, without parts that evaluation mode never uses, or of the network
            before pruning.
        notes: why the network is not fitted as a graph, if it is not; how a budget was spent.
        expected_divergence: from the float network, if sizes were chosen by measurements.
        curve: bytes against expected divergence, if sizes were chosen by measurements.
    """

    network: nn.Module
    own: nn.Module
    config: BGDConfig
    chosen: Chosen
    skipped: tuple[SkippedLayer, ...]
    free: Mapping[str, LayerConfig]
    leftovers: tuple[str, ...]
    tables: frozenset[str]
    original_bytes: int
    beside: tuple[FoundLayer, ...] = ()
    halves: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    expected_divergence: float | None = None
    curve: tuple[CurvePoint, ...] = ()

    @property
    def found(self) -> tuple[FoundLayer, ...]:
        """The layers to be quantized, as they were found."""
        return tuple(layer for layer, _ in self.chosen)

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """The layers to be quantized, as they will be."""
        return tuple(planned for _, planned in self.chosen)

    @property
    def everywhere(self) -> tuple[FoundLayer, ...]:
        """All layers whose weights may take 8 bits: those to be quantized, and those beside them."""
        return (*self.found, *self.beside)

    @property
    def storages(self) -> dict[str, str]:
        """The storage type of each of `leftovers`, by name."""
        usual = self.config.weight_storage
        return {name: "float16" if name in self.halves else usual for name in self.leftovers}

    def require_some(self) -> None:
        """Reject a network without anything to quantize.

        Raises:
            ConfigError: no layer is to be quantized; zeros are to be preserved, and there are none.
        """
        if not self.chosen:
            reasons = "; ".join(f"{s.name}: {s.reason}" for s in self.skipped[:5])
            reasons = reasons or "it has no convolution and no linear layer"
            raise ConfigError(f"no layer of the network can be quantized: {reasons}")
        if self.config.preserve_zeros and not any(planned.mask_form for planned in self.layers):
            raise ConfigError(
                "preserve_zeros=True, but no layer to be quantized has a weight that is zero: prune the "
                "network first, or leave the setting out"
            )

    def noted(self, note: str) -> Survey:
        """The same with one more note."""
        return dataclasses.replace(self, notes=(*self.notes, note))

    def without(self, reasons: Mapping[str, str]) -> Survey:
        """The same with some layers left float.

        Args:
            reasons: by the layer's name.
        """
        return dataclasses.replace(
            self,
            chosen=tuple(pair for pair in self.chosen if pair[0].name not in reasons),
            skipped=(*self.skipped, *(SkippedLayer(name=name, reason=reason) for name, reason in reasons.items())),
            free={name: setting for name, setting in self.free.items() if name not in reasons},
        )

    def budgeted(
        self,
        chosen: Chosen,
        left: Mapping[str, str],
        notes: tuple[str, ...],
        expected_divergence: float | None = None,
        storages: Mapping[str, str] | None = None,
    ) -> Survey:
        """The same with the sizes that a budget chose.

        Args:
            chosen: the layers that are quantized.
            left: reasons by name of those that are float.
            notes: how it was spent.
            expected_divergence: with these sizes.
            storages: by weight name, the storage types that were chosen: "float16" for one that would take 8 bits, or
                "int8" for one that would take half precision.
        """
        storages = storages or {}
        narrow = [name for name, to in storages.items() if to != "float16" and name not in self.leftovers]
        return dataclasses.replace(
            self,
            chosen=chosen,
            skipped=(*self.skipped, *(SkippedLayer(name=name, reason=reason) for name, reason in left.items())),
            leftovers=(*self.leftovers, *narrow),
            halves=frozenset(name for name, to in storages.items() if to == "float16"),
            notes=(*self.notes, *notes),
            expected_divergence=expected_divergence,
        )


def surveyed(
    front: Front | nn.Module, config: BGDConfig, *, original: nn.Module, original_bytes: int | None = None
) -> Survey:
    """Look at a network.

    Args:
        front: as the front end gives it; a network by itself stands for one that nothing was folded in.
        config: the settings.
        original: the network as it came.
        original_bytes: of the network that a chain of steps started from.

    Raises:
        ConfigError: a block size that does not divide its layer, a glob that matches nothing, a wrong `original_bytes`.
    """
    front = front if isinstance(front, Front) else Front(own=front, network=front)
    network = front.network
    found, left = find_layers(network)
    _check_globs(config, found, left)
    first = first_layer(network, found)
    outcomes = [(layer, decided(layer, config, is_first=layer is first)) for layer in found]
    chosen = tuple((f, with_notes(f, p, front.folded)) for f, p in outcomes if isinstance(p, PlannedLayer))
    skipped = [SkippedLayer(name=layer.name, reason=layer.reason) for layer in left]
    skipped += [outcome for _, outcome in outcomes if isinstance(outcome, SkippedLayer)]
    reason = f"fitted by running the network itself, since {front.reason}" if front.reason else ""
    beside = tuple(_beside(found, first, config))
    unused = unused_weights(original, network, front.folded)
    parts = unused_parts(original, network, front.folded)
    return Survey(
        network=network,
        own=front.own,
        config=config,
        chosen=chosen,
        skipped=(*skipped, *unused),
        free=_free(chosen, config, first),
        leftovers=tuple(map(weight_name, beside)),
        beside=beside,
        tables=_tables(front.own),
        original_bytes=_chain_bytes(original, original_bytes, unused_bytes(original, parts)),
        notes=tuple(filter(None, (reason, unused_note(original, parts)))),
    )


def is_finished(network: nn.Module, config: BGDConfig) -> bool:
    """Whether a network has quantized layers, and no other one that the settings would quantize.

    With a budget, a free layer that is still float is one that the budget left so.
    """
    if not any(isinstance(module, PQModule) for module in network.modules()):
        return False
    found, _ = find_layers(network)
    first = first_layer(network, found)
    outcomes = [(layer, decided(layer, config, is_first=layer is first)) for layer in found]
    chosen = tuple((f, p) for f, p in outcomes if isinstance(p, PlannedLayer))
    return not chosen or (config.has_budget and len(_free(chosen, config, first)) == len(chosen))


def _free(chosen: Chosen, config: BGDConfig, first: FoundLayer | None) -> dict[str, LayerConfig]:
    settings = {p.name: setting_of(layer, config, is_first=layer is first)[0] for layer, p in chosen}
    return {n: setting for n, setting in settings.items() if setting and setting.is_open}


def weight_name(layer: FoundLayer) -> str:
    """The name of a layer's weight among the network's parameters."""
    return layer.target if layer.functional else f"{layer.target}.weight"


def _beside(found: Sequence[FoundLayer], first: FoundLayer | None, config: BGDConfig) -> list[FoundLayer]:
    return [
        layer
        for layer in found
        if not _is_named(layer.name, config)
        and not _is_tied(layer)
        and setting_of(layer, config, is_first=layer is first)[0] is None
    ]


def _tables(network: nn.Module) -> frozenset[str]:
    """Frozen parameters of a network that is trained for the most part: position tables, frequencies, class weights.

    Where most of a network is frozen, as for inference or for training a head, that says nothing of a parameter.
    """
    frozen = [(name, p) for name, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad]
    frozen_size = sum({id(p): p.numel() for _, p in frozen}.values())
    trained_size = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return frozenset(name for name, _ in frozen) if frozen_size < trained_size else frozenset()


def _is_tied(layer: FoundLayer) -> bool:
    """Whether other layers share the weight: modules, or look-ups in a table that is a linear layer's weight."""
    return bool(layer.tied) or (layer.family == "embedding" and layer.kind != "embedding")


def _is_named(name: str, config: BGDConfig) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in config.overrides)


def _chain_bytes(model: nn.Module, original_bytes: int | None, unused: int) -> int:
    """Bytes that the network uses, or those of the larger one that it was made from."""
    own = state_bytes(model.state_dict())
    if original_bytes is None:
        return own - unused
    if not isinstance(original_bytes, int) or original_bytes < own:
        raise ConfigError(
            f"original_bytes={original_bytes!r}: the network has {own} bytes, so it cannot have been pruned from a "
            "smaller one: give plan(dense).original_bytes of the network before pruning"
        )
    return original_bytes


def _check_globs(config: BGDConfig, found: Sequence[FoundLayer], left: Sequence[LeftLayer]) -> None:
    names = [layer.name for layer in found] + [layer.name for layer in left]
    for pattern, _ in config.overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"override {pattern!r} matches no layer; the network has {_some(names)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
