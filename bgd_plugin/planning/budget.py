"""Spend a budget on the layers of a network: the options, the choice, and its explanation."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import FoundLayer
from bgd_plugin.planning.bound import fewest_bytes, loss_by_bytes
from bgd_plugin.planning.candidates import (
    Option,
    error_of,
    float_options,
    options_of,
    rated,
    weight_sensitivity,
    worthwhile,
)
from bgd_plugin.planning.knapsack import Choice, choose, require_reachable
from bgd_plugin.planning.losses import LEVEL, Sensitivity, joint_loss
from bgd_plugin.planning.outputs import LOGITS, Scale
from bgd_plugin.planning.rounded import can_be_narrow, narrow_bytes
from bgd_plugin.planning.sizes import Sketch
from bgd_plugin.planning.survey import Chosen, Survey, weight_name
from bgd_plugin.planning.types import CurvePoint
from bgd_plugin.support.seeds import seeded

__all__ = ["AIM", "Budget"]

_CURVE_POINTS = 16
AIM = 0.8
"""Share of a bound at which a choice aims: what comes out differs a little from what is expected."""
_UNMEASURED = (
    "bound: sizes are the fixed default ones, since what each layer's error does to the output was not measured; "
    "quantize() measures it, and so does plan() with calibration data"
)
_FINEST = (
    "bound: no choice of sizes keeps within it: only the layer that bears codes best is quantized; give a larger "
    "max_divergence, or a budget"
)
_ROOM = "the budget has room for it in float"
_COSTLY = "codes would add too much error for the bytes they save"
_NARROW = "8 bits for each weight, with a scale for each row, suit it better than codes"
_BLIND = (
    "budget: estimated from the weights alone, without data; quantize() measures what each layer's error does to the "
    "output, and may choose differently"
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the sizes are chosen for: the longest file, or a bound on the divergence from the float network.

    Attributes:
        survey: of the network, with the layers as the settings have them.
        sketch: of the same, for the length of files.
        target_bytes: the longest file; None with a bound.
        scale: of losses.
        beside: layers without a setting that may take half precision or 8 bits, since it matters.
    """

    survey: Survey
    sketch: Sketch
    target_bytes: int | None
    scale: Scale = LOGITS
    beside: tuple[FoundLayer, ...] = ()
    _worthwhile: dict[str, tuple[Sensitivity, list[tuple[Option, float]]]] = field(default_factory=dict)
    _curves: list[tuple[Mapping[str, Sensitivity], list[tuple[int, float]]]] = field(default_factory=list)

    @classmethod
    def of(cls, survey: Survey, sketch: Sketch | None = None) -> Budget | None:
        """The budget that the settings name; None where they name none, and where a bound finds all sizes fixed.

        Raises:
            ConfigError: it is below the least possible file, whose length the message gives.
        """
        if not survey.config.has_budget or not (survey.free or survey.config.has_target):
            return None
        target = survey.config.budget_bytes(survey.original_bytes)
        budget = cls(survey=survey, sketch=sketch or Sketch(survey), target_bytes=target)
        if target is not None:
            require_reachable(budget._options, target, budget._file_size, "; ".join(survey.notes))
        return budget

    @classmethod
    def free_of(cls, survey: Survey, sketch: Sketch) -> Budget:
        """What could be chosen under settings that name no budget."""
        return cls(survey=survey, sketch=sketch, target_bytes=None)

    @property
    def bound(self) -> float | None:
        """The bound on the loss."""
        bound = self.survey.config.bound
        return None if bound is None else bound * self.scale.tolerance

    @property
    def open(self) -> tuple[FoundLayer, ...]:
        """The layers for which there is a choice, in the order of their options."""
        return (*self.free, *self.beside)

    @property
    def free(self) -> tuple[FoundLayer, ...]:
        """The layers whose sizes are to be chosen."""
        return tuple(found for found, planned in self.survey.chosen if planned.name in self.survey.free)

    def spend(
        self, sensitivities: Mapping[str, Sensitivity] | None, realized: float = 1.0, *, progress: bool = False
    ) -> Survey:
        """Choose.

        Args:
            sensitivities: of the free layers; None: by their weights alone.
            realized: measured divergence over expected loss, where an earlier fit has shown it.
            progress: show a progress bar while layers are rated by their weights.

        Returns:
            the survey with the layers as chosen. With a bound, and without sensitivities, the layers as they are.

        Raises:
            ConfigError: the budget is too small for anything, or large enough for everything in float.
        """
        if self.target_bytes is None and not sensitivities:
            return self.survey.noted(_UNMEASURED)
        names = [layer.name for layer in self.open]
        known = self._known(sensitivities or {}, progress=progress)
        if self.target_bytes is not None:
            choice = self._within_bytes(known, self.target_bytes)
        else:
            choice = self._within_bound(known, realized)
        pairs = list(zip(choice.options, names, strict=True))
        chosen = self._chosen([_explained(option, known[name]) for option, name in pairs])
        if not chosen:
            raise ConfigError(
                f"a budget of {self.target_bytes:,} bytes has room for every layer in float: no layer is left to "
                "quantize; give a smaller file size"
            )
        free = {layer.name for layer in self.free}
        why = _COSTLY if self.target_bytes is None else _ROOM
        left = {name: _NARROW if o.is_narrow else why for o, name in pairs if o.layer is None and name in free}
        notes, storages = self._notes(choice, sensitivities, realized), self._storages(choice.options)
        expected = choice.loss * realized if sensitivities else None
        return self.survey.budgeted(chosen, left, notes, expected, storages)

    def curve(self, sensitivities: Mapping[str, Sensitivity], realized: float = 1.0) -> tuple[CurvePoint, ...]:
        """Bytes against expected divergence, from the smallest file that can be chosen to every layer in float.

        Args:
            sensitivities: as in `spend`.
            realized: factor, as in `spend`.
        """
        if not self._curves or self._curves[-1][0] is not sensitivities:  # the factor changes nothing else in it
            self._curves.append((sensitivities, self._loss_by_bytes(self._known(sensitivities))))
        points = self._curves[-1][1]
        return tuple(CurvePoint(file_bytes=size, expected_divergence=loss * realized) for size, loss in points)

    def _loss_by_bytes(self, known: Mapping[str, Sensitivity]) -> list[tuple[int, float]]:
        """Pairs of a file's bytes and its expected loss."""
        smallest = [layer[0] for layer in self._options]
        beside = self._file_size(smallest) - sum(option.size_bytes for option in smallest)
        points = loss_by_bytes(
            lambda level: self.rated(known, level), lambda picked: self.loss(picked, known), _CURVE_POINTS
        )
        return [(beside + size, loss) for size, loss in points]

    def rated(self, known: Mapping[str, Sensitivity], level: float = LEVEL) -> list[list[Option]]:
        """The options of each free layer that may be chosen, with their losses.

        Args:
            known: the sensitivity of each free layer, by name.
            level: loss of all layers together, in nats, at which each one's share is told.
        """
        pairs = [(options, known[layer.name]) for options, layer in zip(self._options, self.open, strict=True)]
        names = [layer.name for layer in self.open]
        return [rated(self._of_worth(name, *pair), pair[1], level) for name, pair in zip(names, pairs, strict=True)]

    def _of_worth(self, name: str, options: Sequence[Option], known: Sensitivity) -> list[tuple[Option, float]]:
        """A layer's options that are worth a thought; they are the same for all choices that know the same of it."""
        if name not in self._worthwhile or self._worthwhile[name][0] is not known:
            self._worthwhile[name] = known, worthwhile(options, known)
        return self._worthwhile[name][1]

    def loss(self, picked: Sequence[Option], known: Mapping[str, Sensitivity]) -> float:
        """The expected loss in nats of options, one `picked` for each open layer; sensitivities are `known` by name."""
        pairs = [(option, known[layer.name]) for option, layer in zip(picked, self.open, strict=True)]
        return joint_loss([(one, error_of(option, one)) for option, one in pairs])

    def _within_bound(self, known: Mapping[str, Sensitivity], realized: float) -> Choice:
        assert self.bound is not None
        level = AIM * self.bound / realized
        options = self.rated(known, level)
        picked = [layer[i] for layer, i in zip(options, fewest_bytes(options, level), strict=True)]
        if all(option.layer is None for option in picked) and not self._fixed:
            index, option = self._least_harmful(known)
            picked[index] = option
        return Choice(options=tuple(picked), file_bytes=self._file_size(picked), loss=self.loss(picked, known))

    def _least_harmful(self, known: Mapping[str, Sensitivity]) -> tuple[int, Option]:
        """The place of the layer that bears codes best, and its finest ones."""
        costs = [
            (known[layer.name].per_error() * error_of(option, known[layer.name]), index, option)
            for index, (options, layer) in enumerate(zip(self._options, self.open, strict=True))
            for option in options
            if option.layer is not None
        ]
        _, index, option = min(costs, key=lambda cost: cost[:2])
        return index, option

    def _within_bytes(self, known: Mapping[str, Sensitivity], target_bytes: int) -> Choice:
        """The choice for a file; shares are told at the loss that it comes to, which the first choice shows."""
        choice = choose(self.rated(known), target_bytes, self._file_size)
        level = self.loss(choice.options, known)
        if level > 0:
            choice = choose(self.rated(known, level), target_bytes, self._file_size)
        return dataclasses.replace(choice, loss=self.loss(choice.options, known))

    @property
    def _fixed(self) -> int:
        return len(self.survey.chosen) - len(self.free)

    def _known(self, measured: Mapping[str, Sensitivity], *, progress: bool = False) -> dict[str, Sensitivity]:
        """What was measured; a layer that could not be measured counts as one of the measured ones in the middle."""
        others = self._by_weights(measured, progress=progress)
        if others and measured:
            middle = statistics.median(one.per_error() for one in measured.values() if one.curves)
            others = {name: dataclasses.replace(one, losses=((1.0, middle),)) for name, one in others.items()}
        return {**others, **measured}

    @functools.cached_property
    def _options(self) -> list[list[Option]]:
        return [
            options_of(
                planned,
                self._float_bytes(found),
                self.survey.free[planned.name].codebook_size,
                codes=self.survey.config.codes,
                narrow_bytes=self._narrow_bytes(found) if found.family == "embedding" else None,
            )
            for found, planned in self.survey.chosen
            if planned.name in self.survey.free
        ] + [float_options(self._float_bytes(found), self._narrow_bytes(found)) for found in self.beside]

    def _chosen(self, picked: Sequence[Option]) -> Chosen:
        """All layers to be quantized, the free ones as picked."""
        layers = dict(zip((layer.name for layer in self.open), (option.layer for option in picked), strict=True))
        outcomes = [(f, layers.get(p.name, p)) for f, p in self.survey.chosen]
        return tuple((f, p) for f, p in outcomes if p is not None)

    def _file_size(self, picked: Sequence[Option]) -> int:
        return self.sketch.file_size(self._chosen(picked), self._storages(picked))

    def _storages(self, picked: Sequence[Option]) -> dict[str, str]:
        """By weight name, the storage types of float weights that are not the usual ones."""
        usual = set(self.survey.leftovers)
        pairs = [(weight_name(layer), o.is_narrow) for o, layer in zip(picked, self.open, strict=True) if not o.layer]
        return {name: "int8" if narrow else "float16" for name, narrow in pairs if narrow != (name in usual)}

    def _narrow_bytes(self, layer: FoundLayer) -> int | None:
        return narrow_bytes(layer) if can_be_narrow(layer, self.survey.config) else None

    def _float_bytes(self, layer: FoundLayer) -> int:
        size = layer.weight.element_size()
        return layer.weight.numel() * (min(size, 2) if self.survey.config.float_storage == "float16" else size)

    def _by_weights(self, measured: Mapping[str, Sensitivity], *, progress: bool) -> dict[str, Sensitivity]:
        seed, codes = self.survey.config.seed, self.survey.config.codes
        rest = [layer for layer in self.free if layer.name not in measured]
        bar = tqdm(rest, disable=not progress, desc="estimate", unit="layer", dynamic_ncols=True)
        return {x.name: weight_sensitivity(x.matrix, seeded(seed, x.name, "budget"), codes) for x in bar}

    def _notes(
        self, choice: Choice, sensitivities: Mapping[str, Sensitivity] | None, realized: float
    ) -> tuple[str, ...]:
        more = f"; {self._fixed} more have fixed sizes" if self._fixed else ""
        if self.target_bytes is None:
            bound, called = self.bound, "divergence" if self.scale.measure == "KL" else "relative squared error"
            note = (
                f"bound: sizes of {len(self.free)} layers chosen for the smallest file within a {called} of "
                f"{bound:.3g}: {choice.file_bytes:,} bytes, expected {choice.loss * realized:.3g}{more}"
            )
            return (note, _FINEST) if choice.loss * realized > (bound or 0) else (note,)
        share = choice.file_bytes / self.target_bytes
        spent = f"budget: {choice.file_bytes:,} of {self.target_bytes:,} bytes ({share:.2%})"
        note = f"{spent}; sizes of {len(self.free)} layers chosen for the lowest expected loss, {choice.loss:.3g}{more}"
        return (note,) if sensitivities is not None else (note, _BLIND)


def _explained(option: Option, sensitivity: Sensitivity) -> Option:
    layer = option.layer
    if layer is None:
        return option
    notes = [f"budget: {sensitivity.reason}; expected {option.loss:.2g}"]
    if layer.mask_form:
        notes.append(f"zeros: {layer.mask_form}, {8 * layer.mask_bytes / layer.weights:.2f} bits/weight")
    return dataclasses.replace(option, layer=dataclasses.replace(layer, note="; ".join(notes)))
