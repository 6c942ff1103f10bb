"""Spend a budget on the layers of a network: what there is to choose, the choice, and how it is explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
from bgd_plugin.planning.sizes import Sketch
from bgd_plugin.planning.survey import Chosen, Survey
from bgd_plugin.support.seeds import seeded

__all__ = ["Budget"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of bytes, and what it is for.

    Attributes:
        survey: of the network, with the layers as the settings have them.
        sketch: of the same, for the length of files.
        target_bytes: the longest file.
    """

    survey: Survey
    sketch: Sketch
    target_bytes: int

    @classmethod
    def of(cls, survey: Survey, sketch: Sketch | None = None) -> Budget | None:
        """The budget that the settings name; None where they name none.

        Raises:
            ConfigError: it is below the least possible file, whose length the message gives.
        """
        target = survey.config.budget_bytes(survey.original_bytes)
        if target is None:
            return None
        budget = cls(survey=survey, sketch=sketch or Sketch(survey), target_bytes=target)
        require_reachable(budget._options(), target, budget._file_size)
        return budget

    @property
    def free(self) -> tuple[FoundLayer, ...]:
        """The layers whose sizes are to be chosen."""
        return tuple(found for found, planned in self.survey.chosen if planned.name in self.survey.free)

    def spend(self, sensitivities: Mapping[str, Sensitivity] | None) -> Survey:
        """Choose.

        Args:
            sensitivities: of the free layers; None: by their weights alone.

        Returns:
            the survey with the layers as chosen.

        Raises:
            ConfigError: the budget is too small for anything, or large enough for everything in float.
        """
        free = [layer.name for layer in self.free]
        known = {**self._by_weights(sensitivities or {}), **(sensitivities or {})}
        options = [rated(o, known[name]) for o, name in zip(self._options(), free, strict=True)]
        choice = choose(options, self.target_bytes, self._file_size)
        pairs = list(zip(choice.options, free, strict=True))
        chosen = self._chosen([_explained(option, known[name]) for option, name in pairs])
        if not chosen:
            raise ConfigError(
                f"a budget of {self.target_bytes:,} bytes has room for every layer in float: no layer is left to "
                "quantize; ask for less"
            )
        left = [name for option, name in pairs if option.layer is None]
        return self.survey.budgeted(chosen, left, self._notes(choice, sensitivities))

    def _options(self) -> list[list[Option]]:
        return [
            options_of(planned, self._float_bytes(found))
            for found, planned in self.survey.chosen
            if planned.name in self.survey.free
        ]

    def _chosen(self, picked: Sequence[Option]) -> Chosen:
        """All layers to be quantized, the free ones as picked."""
        layers = dict(zip((layer.name for layer in self.free), (option.layer for option in picked), strict=True))
        outcomes = [(f, layers.get(p.name, p)) for f, p in self.survey.chosen]
        return tuple((f, p) for f, p in outcomes if p is not None)

    def _file_size(self, picked: Sequence[Option]) -> int:
        return self.sketch.file_size(self._chosen(picked))

    def _float_bytes(self, layer: FoundLayer) -> int:
        size = layer.weight.element_size()
        return layer.weight.numel() * (min(size, 2) if self.survey.config.float_storage == "float16" else size)

    def _by_weights(self, measured: Mapping[str, Sensitivity]) -> dict[str, Sensitivity]:
        seed = self.survey.config.seed
        return {
            layer.name: weight_sensitivity(layer.matrix, seeded(seed, layer.name, "budget"))
            for layer in self.free
            if layer.name not in measured
        }

    def _notes(self, choice: Choice, sensitivities: Mapping[str, Sensitivity] | None) -> tuple[str, ...]:
        share = choice.file_bytes / self.target_bytes
        spent = f"budget: {choice.file_bytes:,} of {self.target_bytes:,} bytes ({share:.2%})"
        what = f"sizes of {len(self.free)} layers chosen for the least sum of losses, {choice.loss:.3g}"
        fixed = len(self.survey.chosen) - len(self.free)
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
