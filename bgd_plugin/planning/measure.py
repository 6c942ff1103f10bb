"""Measurements before the fit: what each layer's error does to the output, and what all errors together do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from bgd_plugin.calibration import Batch, Batches, first_samples, logits_of
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import isolated_weights, untouched
from bgd_plugin.planning.answers import compare_answers
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.losses import LEVEL, Sensitivity
from bgd_plugin.planning.outputs import LOGITS, Scale, has_logits
from bgd_plugin.planning.perturbation import changed, changes_of
from bgd_plugin.planning.rounded import measure_rounding, roundings
from bgd_plugin.planning.sensitivity import Measured, measure_layers
from bgd_plugin.planning.survey import Survey
from bgd_plugin.support.processes import from_first, is_first

__all__ = ["Measurements", "measured"]

_SAMPLES = 64
"""Calibration samples on which all errors together are tried where too few are kept aside."""
_FEW = 16
_LAST = 2.0, 4.0
_TOKENS = 256
"""Tokens with logits that are as good as so few samples."""
_KEPT = 1 << 22
"""Numbers in the float network's answers to them, up to which they are kept from one trial to the next."""
_KEPT_SHARE = 4
"""The part of the memory for calibration values that more of them may take, as long as trials follow each other."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured on the float network.

    Attributes:
        budget: whose free layers were measured.
        batches: the calibration data.
        aside: samples kept aside, on which all errors together are tried, since the answers are judged by them.
        sensitivities: of the layers, by name; a layer that no input reaches has none. Layers without a setting are
            among them where their rounding to 8 bits costs more than next to nothing.
        layers: the same with an error of each layer; only in the process that measured them.
        scale: of the losses.
    """

    budget: Budget
    batches: Sequence[Batch]
    aside: Sequence[Batch]
    sensitivities: Mapping[str, Sensitivity]
    layers: Mapping[str, Measured]
    scale: Scale
    _few: list[Sequence[Batch]] = field(default_factory=list)
    _answers: list[Any] = field(default_factory=list)
    _network: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """A context in which several trials share the network whose weights are exchanged; making it takes time."""
        with _apart(self.budget) as network:
            self._network.append(network)
            try:
                yield
            finally:
                self._network.clear()
                if _numbers(self._answers) > _KEPT:
                    self._answers.clear()

    def joint(self, survey: Survey, energy: float = 1.0) -> float:
        """The divergence from the float network when all layers of a survey have errors of the sizes expected.

        The errors are those of rough quantizations, made larger or smaller; the first process tries them.

        Args:
            survey: with sizes chosen.
            energy: share of the errors' energy that is left, except in the last layers, where more is (`_shares`).
        """

        def work() -> tuple[dict[str, Tensor], str]:
            return {}, json.dumps(self._tried(survey, energy))

        return float(json.loads(from_first(work)[1]))

    def _tried(self, survey: Survey, energy: float) -> float:
        errors = [
            (one, (share * energy * one.sensitivity.error_of(planned) / one.size) ** 0.5)
            for planned, share in zip(survey.layers, _shares(len(survey.layers), survey.config), strict=True)
            if (one := self.layers.get(planned.name)) is not None
        ]
        found = self.budget.survey
        with nullcontext(self._network[0]) if self._network else _apart(self.budget) as network:
            changes = [change for one, scale in errors for change in changes_of(network, one.error, scale)]
            rounded = roundings(network, dataclasses.replace(survey, network=found.network), found.everywhere)
            changes += [change for one in rounded.values() for change in one]

            def with_errors(batch: Batch) -> Any:
                with changed(changes):
                    return batch.call(network)

            few = self._tried_on(network)
            exact = self._exact(network, few)
            answers = compare_answers(with_errors, exact, few, kept_aside=False, measure=self.scale.measure)
        return answers.divergence

    def _exact(self, network: nn.Module, few: Sequence[Batch]) -> Callable[[Batch], Any]:
        """The float network's answers to a few batches, asked for in their order; kept where that takes no room."""
        if len(self._answers) == len(few):
            kept = iter(self._answers)
            return lambda batch: next(kept)
        self._answers.clear()

        def answered(batch: Batch) -> Any:
            answer = batch.call(network)
            if _numbers(answer) * len(few) <= self._most_kept:
                self._answers.append(answer)
            return answer

        return answered

    @property
    def _most_kept(self) -> int:
        """Numbers in all answers up to which they are kept."""
        bound = self.batches.store.bound_bytes if isinstance(self.batches, Batches) and self._network else None
        return max(_KEPT, (bound or 0) // _KEPT_SHARE // torch.float32.itemsize)

    @torch.no_grad()
    def _tried_on(self, network: nn.Module) -> Sequence[Batch]:
        """The samples on which errors are tried: those that will judge, if they tell enough."""
        if not self._few:
            samples = sum(batch.size for batch in self.aside)
            enough = samples >= _FEW or (samples and samples * _tokens(self.aside[0].call(network)) >= _TOKENS)
            self._few.append(self.aside if enough else first_samples(self.batches, _SAMPLES))
        return self._few[0]


def _numbers(answers: Any) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(answers) if isinstance(t, Tensor))


def _tokens(answer: Any) -> int:
    """How many tokens of a sample have logits of their own; 1 where it has no more than one answer."""
    logits = logits_of(answer) if has_logits(answer) else None
    return logits.shape[1] if logits is not None and logits.ndim == 3 else 1


def _shares(count: int, config: BGDConfig) -> list[float]:
    """How much more of the errors' energy is left in the last ones of so many layers, as few are fitted after them.

    The fit of a layer aims halfway at the float network's outputs, which leaves about a third of the energy; of the
    last layer's error nothing is made good.
    """
    last = _LAST if config.makes_good else (1.0, 1.0)
    return [*[1.0] * count, *last][-count:] if count else []


def measured(budget: Budget, batches: Sequence[Batch], aside: Sequence[Batch] = (), *, progress: bool) -> Measurements:
    """Measure the layers whose sizes are to be chosen; the first process does, on its data.

    Args:
        budget: holds the survey, and the layers whose sizes are to be chosen.
        batches: calibration batches.
        aside: samples kept aside.
        progress: show a progress bar.
    """
    layers: dict[str, Measured] = {}

    def work() -> tuple[dict[str, Tensor], str]:
        shown = progress and is_first()
        count = len(budget.free)
        with (
            tqdm(total=count, disable=not shown, desc="measure", unit="layer", dynamic_ncols=True) as bar,
            _apart(budget) as network,
        ):
            layers.update(measure_layers(network, batches, budget.free, budget.survey.config, bar.update))
            scale = next((one.scale for one in layers.values()), LOGITS)
            level = (budget.survey.config.bound or LEVEL) * scale.tolerance
            beside = measure_rounding(network, first_samples(batches, _FEW), budget.survey, scale, level)
        known = {name: one.sensitivity for name, one in layers.items()} | beside
        return {}, json.dumps([dataclasses.asdict(scale), {name: one.to_dict() for name, one in known.items()}])

    scale, found = json.loads(from_first(work)[1])
    return Measurements(
        budget=budget,
        batches=batches,
        aside=aside,
        sensitivities={name: Sensitivity.from_dict(values) for name, values in found.items()},
        layers=layers,
        scale=Scale(**scale),
    )


@contextmanager
def _apart(budget: Budget) -> Iterator[nn.Module]:
    """The network with weights that can be exchanged; it is as before at the end."""
    network, layers = budget.survey.network, (*budget.free, *budget.survey.beside)
    with isolated_weights(network, layers), untouched(network) as (running,):
        yield running
