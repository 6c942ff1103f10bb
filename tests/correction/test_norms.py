"""Which norms of a run are corrected, by which formula, and what the report says of them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.correction import norms
from bgd_plugin.correction.gain import Gain
from tests.networks import NormedBranch, SmallResNet, em, images, randomized


class _NoGraph(SmallResNet):
    """Its code looks at a value, which no trace follows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool((x == x).all()) else -x)


@pytest.mark.parametrize(
    ("build", "function"), [(SmallResNet, "correct_batchnorm_"), (_NoGraph, "correct_batchnorm_at_")]
)
def test_the_report_tells_norms_that_were_corrected_from_those_that_were_not(
    build: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = {"bn2": Gain(before=0.5, after=0.5, taken_back=True), "bn3": Gain(before=0.4, after=0.1)}
    monkeypatch.setattr(norms, function, lambda walk, place, *_: gains.get(str(getattr(place, "target", place))))
    report = bgd.quantize(randomized(build()), images(), em(batchnorm="matched"), progress=False).report
    said = [note for note in report.notes if note.startswith("batch norm")]
    assert said == [
        "batch norm (matched): 1 corrected, median output error 40.00% → 10.00% of the variance",
        "batch norm: undone, because it did harm on samples kept aside: bn2",
    ]
    assert report.seconds["batch norm"] > 0


def test_where_every_correction_is_undone_no_gain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    undone = Gain(before=0.5, after=0.5, taken_back=True)
    monkeypatch.setattr(norms, "correct_batchnorm_", lambda *_: undone)
    report = bgd.quantize(randomized(SmallResNet()), images(), em(batchnorm="matched"), progress=False).report
    assert "batch norm (matched): 0 corrected" in report.notes


@pytest.mark.parametrize("build", [SmallResNet, _NoGraph])
def test_keep_leaves_the_statistics(build: Any) -> None:
    model = randomized(build())
    result = bgd.quantize(model, images(), em(batchnorm="keep"), progress=False)
    for name in ("bn1", "bn2", "bn3"):
        assert torch.equal(result.model.get_submodule(name).running_mean, model.get_submodule(name).running_mean)  # type: ignore[arg-type]
    assert not any("batch norm" in note for note in result.report.notes)


@pytest.mark.parametrize(("step", "has_skip"), [(0.5, True), (0.0, False)])
def test_only_a_norm_whose_layer_was_fitted_to_the_skips_drift_is_corrected_to_it(
    step: float, has_skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, skips = norms.correct_batchnorm_, dict[str, Any]()

    def watched(walk: Any, node: Any, mode: Any, skip: Any) -> Any:
        skips[str(node.target)] = None if skip is None else skip.name
        return real(walk, node, mode, skip)

    monkeypatch.setattr(norms, "correct_batchnorm_", watched)
    small = bgd.LayerConfig(block_size=1, codebook_size=4)
    config = bgd.BGDConfig(first_layer=small, pointwise_conv=small, asymmetric_step=step, max_divergence=None)
    bgd.quantize(randomized(NormedBranch()), images(), config, progress=False)
    assert (skips["norm"] is not None) == has_skip
    assert skips["last"] is None


def test_norms_that_run_at_several_places_are_named_in_their_order() -> None:
    one = norms.NormCorrection(nn.Linear(2, 2), "matched", lambda name: contextlib.nullcontext())
    walk: Any = SimpleNamespace(runs_twice=lambda path: True)
    names = [f"block.{number}.norm" for number in (3, 1, 4, 0, 2)]
    for name in names:
        one.correct_at_(walk, name)
    assert one.notes() == [
        "batch norm (matched): nothing to correct: no batch norm follows a quantized layer",
        f"batch norm: not corrected, because they are called at several places: {', '.join(sorted(names))}",
    ]
