"""How many steps a run has, and who draws the bar."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from bgd_plugin import DistillationConfig, FinetuningConfig, ReconstructionConfig
from bgd_plugin.graph import front_end
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.quantization import progress_bar as module
from bgd_plugin.quantization.progress_bar import progress_bar
from bgd_plugin.training import reconstruction_steps
from tests.networks import SmallResNet, em


class _Branching(SmallResNet):
    """No trace follows it."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) if float(x.abs().max()) > 0 else x


def _survey(model: nn.Module, **fields: Any) -> Survey:
    return surveyed(front_end(model), em(**fields), original=model)


def test_layers_and_steps_of_training_are_counted() -> None:
    survey = _survey(SmallResNet())
    layers = len(survey.layers)
    assert layers == 4 and progress_bar(survey, 3, shown=False).total == layers
    distilled = _survey(SmallResNet(), distillation=DistillationConfig(steps=7))
    assert progress_bar(distilled, 3, shown=False).total == layers * 8
    finetuned = _survey(SmallResNet(), finetuning=FinetuningConfig(epochs=2))
    assert progress_bar(finetuned, 3, shown=False).total == layers + 2 * 3
    reconstruction = ReconstructionConfig(steps=5)
    rebuilt = _survey(SmallResNet(), reconstruction=reconstruction)
    steps = reconstruction_steps(rebuilt.network, [layer.target for layer in rebuilt.layers], reconstruction)  # type: ignore[arg-type]
    assert steps > 0 and progress_bar(rebuilt, 3, shown=False).total == layers + steps


def test_without_a_graph_the_steps_of_reconstruction_are_not_known_yet() -> None:
    survey = _survey(_Branching(), reconstruction=ReconstructionConfig(steps=5))
    assert progress_bar(survey, 3, shown=False).total == len(survey.layers)


@pytest.mark.parametrize(("shown", "is_first"), [(True, True), (True, False), (False, True)])
def test_the_first_process_draws_it_if_it_is_shown(
    shown: bool, is_first: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "is_first", lambda: is_first)
    with progress_bar(_survey(SmallResNet()), 3, shown=shown) as bar:
        bar.update()
    drawn = capsys.readouterr().err
    assert ("quantize" in drawn and "1/4" in drawn) == (shown and is_first)
