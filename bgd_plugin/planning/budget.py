"""Spend a budget on the layers of a network: what there is to choose, the choice, and how it is explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import FoundLayer
from bgd_plugin.planning.candidates import (
    Choice,
    Option,
    Sensitivity,
    choose,
    options_of,
    rated,
    require_reachable,
    weight_sensitivity,
)
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.support.seeds import seeded

__all__ = ["Budget"]

Layers = list[tuple[FoundLayer, "PlannedLayer"]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of bytes, and what it is for.

    Attributes:
        layers: all layers to be quantized, as the settings have them.
        free: names of those whose sizes are to be chosen.
        target_bytes: the longest file.
        file_size: length of the file with such layers.
        float_storage: the type in which a layer is stored that stays float.
        seed: of the quick fits.
    """

    layers: Layers
    free: Sequence[str]
    target_bytes: int
    file_size: Callable[[Layers], int]
    float_storage: str
    seed: int

    def require_reachable(self) -> None:
        """Refuse a budget below the least possible file.

        Raises:
            ConfigError: saying how long that is.
        """
        require_reachable(self._options(), self.target_bytes, self._file_size)

    def spend(self, sensitivities: Mapping[str, Sensitivity] | None) -> tuple[Layers, list[str], tuple[str, ...]]:
        """Choose.

        Args:
            sensitivities: of the free layers; None: by their weights alone.

        Returns:
            all layers to be quantized, the names of those that are left float, and notes.

        Raises:
            ConfigError: the budget is too small for anything, or large enough for everything in float.
        """
        known = {**self._by_weights(sensitivities or {}), **(sensitivities or {})}
        options = [rated(o, known[name]) for o, name in zip(self._options(), self.free, strict=True)]
        choice = choose(options, self.target_bytes, self._file_size)
        pairs = list(zip(choice.options, self.free, strict=True))
        layers = self._layers([_explained(option, known[name]) for option, name in pairs])
        if not layers:
            raise ConfigError(
                f"a budget of {self.target_bytes:,} bytes has room for every layer in float: no layer is left to "
                "quantize; ask for less"
            )
        return layers, [name for option, name in pairs if option.layer is None], self._notes(choice, sensitivities)

    def _options(self) -> list[list[Option]]:
        by_name = {p.name: (f, p) for f, p in self.layers}
        return [options_of(by_name[name][1], self._float_bytes(by_name[name][0])) for name in self.free]

    def _layers(self, picked: Sequence[Option]) -> Layers:
        """All layers to be quantized, the free ones as picked."""
        chosen = dict(zip(self.free, (option.layer for option in picked), strict=True))
        outcomes = [(f, chosen.get(p.name, p)) for f, p in self.layers]
        return [(f, p) for f, p in outcomes if p is not None]

    def _file_size(self, picked: Sequence[Option]) -> int:
        return self.file_size(self._layers(picked))

    def _float_bytes(self, layer: FoundLayer) -> int:
        size = layer.weight.element_size()
        return layer.weight.numel() * (min(size, 2) if self.float_storage == "float16" else size)

    def _by_weights(self, measured: Mapping[str, Sensitivity]) -> dict[str, Sensitivity]:
        weights = {p.name: f.matrix for f, p in self.layers}
        return {
            name: weight_sensitivity(weights[name], seeded(self.seed, name, "budget"))
            for name in self.free
            if name not in measured
        }

    def _notes(self, choice: Choice, sensitivities: Mapping[str, Sensitivity] | None) -> tuple[str, ...]:
        share = choice.file_bytes / self.target_bytes
        spent = f"budget: {choice.file_bytes:,} of {self.target_bytes:,} bytes ({share:.2%})"
        what = f"sizes of {len(self.free)} layers chosen for the least sum of losses, {choice.loss:.3g}"
        fixed = len(self.layers) - len(self.free)
        note = f"{spent}; {what}" + (f"; {fixed} more as the settings fix them" if fixed else "")
        if sensitivities is not None:
            return (note,)
        blind = (
            "budget: chosen without data, by the weights alone; quantize measures what each layer's error does to the "
        )
        return note, blind + "output, and may choose otherwise"


def _explained(option: Option, sensitivity: Sensitivity) -> Option:
    layer = option.layer
    if layer is None:
        return option
    notes = [f"budget: {sensitivity.reason}, expected {option.loss:.2g}"]
    if layer.mask_form:
        notes.append(f"zeros: {layer.mask_form}, {8 * layer.mask_bytes / layer.weights:.2f} bits/weight")
    return dataclasses.replace(option, layer=dataclasses.replace(layer, note="; ".join(notes)))
