"""One layer of a run: what is asked of the fit, what becomes of it, and what is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Rerun
from bgd_plugin.correction import DriftedSkip
from bgd_plugin.fitting import FittedLayer
from bgd_plugin.nn import storable
from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.quantization import layer as step
from bgd_plugin.quantization.resume import Run
from bgd_plugin.support.log import Log
from tests.networks import SmallResNet, em, images, randomized, vectors

CONFIG = bgd.BGDConfig(max_divergence=None, kept_aside=0.0)


def test_a_finished_layer_is_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []
    fit, judged = step._fit, step._judged_shift

    def counted(job: Any, found: Any, *arguments: Any) -> Any:
        fitted.append(found.name)
        return fit(job, found, *arguments)

    def counted_shift(job: Any, found: Any, *arguments: Any) -> Any:
        fitted.append(f"{found.name} shift")
        return judged(job, found, *arguments)

    monkeypatch.setattr(step, "_fit", counted)
    monkeypatch.setattr(step, "_judged_shift", counted_shift)
    model = randomized(SmallResNet())
    first = bgd.quantize(model, images(), CONFIG, checkpoint=tmp_path, progress=False)
    assert set(fitted) == {*(layer.name for layer in first.report.layers), "fc shift"}
    fitted.clear()
    again = bgd.quantize(model, images(), CONFIG, checkpoint=tmp_path, progress=False)
    assert not fitted
    assert [x.relative_error for x in again.report.layers] == [x.relative_error for x in first.report.layers]


@pytest.mark.parametrize("helps", [True, False])
def test_a_shift_that_does_not_help_goes_and_is_told(helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(step, "shift_helps", lambda *arguments: asked.append(arguments) or helps)
    fit = FittedLayer(
        codebook=torch.randn(4, 4), codes=torch.randint(0, 4, (8, 2)), bias_shift=torch.ones(8), warnings=("a",)
    )
    found: Any = SimpleNamespace(name="x", weight=torch.ones(8, 8), matrix=torch.ones(8, 8))
    job: Any = SimpleNamespace(log=Log(), generator=lambda name: name)
    skip: Any = SimpleNamespace(drift="drift")
    for given in (None, skip):
        result = step._judged_shift(job, found, fit, [], given)  # type: ignore[arg-type]
        assert asked[-1][3] == "x shift" and asked[-1][4] == (None if given is None else "drift")
        assert torch.equal(asked[-1][1], fit.codebook[fit.codes].reshape(8, 8))
    if helps:
        assert result is fit
    else:
        assert result.bias_shift is None and result.codes is fit.codes
        assert result.warnings == ("a", "bias correction undone: the error rose on samples kept aside")


def test_the_error_is_that_of_the_weight_without_the_scale_that_the_norm_took(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[torch.Tensor] = []
    scales: dict[int, Any] = {}
    error, store = step.output_error, Run.store

    def watched(weight: Any, decoded: Any, sample: Any) -> float:
        told.append(decoded.clone())
        return error(weight, decoded, sample)

    def stored(self: Run, index: int, planned: Any, fit: FittedLayer) -> None:
        scales[index] = fit.row_scale
        store(self, index, planned, fit)

    monkeypatch.setattr(step, "output_error", watched)
    monkeypatch.setattr(Run, "store", stored)
    result = bgd.quantize(randomized(SmallResNet()), images(), CONFIG, progress=False)
    rows = result.report.layers
    assert any(scale is not None for scale in scales.values())
    for index, row in enumerate(rows):
        matrix: Any = result.model.get_submodule(row.name).matrix.detach()  # type: ignore[union-attr]
        scale = scales[index]
        expected = matrix if scale is None else matrix / scale.reshape(-1, *(1 for _ in matrix.shape[1:]))
        torch.testing.assert_close(told[index], expected, rtol=1e-2, atol=1e-3)


def test_a_row_of_the_report_has_what_the_shift_of_its_bias_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "shift_gain", lambda shift, decoded, sample: 0.25)
    monkeypatch.setattr(step, "shift_helps", lambda *_: True)
    report = bgd.quantize(randomized(SmallResNet()), images(), CONFIG, progress=False).report
    assert {layer.name: layer.bias_gain for layer in report.layers}.items() >= {"fc": 0.25, "conv1": None}.items()


@pytest.mark.parametrize(
    ("outputs", "columns", "rows"),
    [(64, 10, 4096), (512, 10, 2048), (4096, 10, 1024), (64, 2000, 2000), (64, 10**9, 1)],
)
def test_rows_that_tell_the_error_give_a_million_outputs(outputs: int, columns: int, rows: int) -> None:
    """A thousand rows at the least, and no more than four million inputs."""
    found = SimpleNamespace(columns=columns, matrix=range(outputs))
    assert step._error_rows(found) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("method", ["full", "em"])
def test_the_fit_knows_the_zeros_that_stay(method: Any, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: dict[str, Any] = {}
    real = step.METHODS[method]

    def collect(context: Any, generator: Any) -> Any:
        contexts[context.layer.name] = context
        return real.collect(context, generator)

    watched = SimpleNamespace(collect=collect, solve=real.solve)
    monkeypatch.setattr(step, "METHODS", {method: watched})
    model = randomized(SmallResNet())
    model.conv2.weight.data *= torch.rand_like(model.conv2.weight) > 0.5
    config = dataclasses.replace(CONFIG, method=method, preserve_zeros=keeps, rotation=False)
    bgd.quantize(model, images(), config, progress=False)
    mask = contexts["conv2"].mask
    assert torch.equal(mask, model.conv2.weight != 0) if keeps else mask is None
    assert contexts["conv1"].has_batchnorm and not contexts["conv1"].has_bias
    assert contexts["conv1"].scale_bounds is not None
    assert contexts["fc"].has_bias and not contexts["fc"].has_batchnorm and contexts["fc"].scale_bounds is None


@pytest.mark.parametrize("has_target", [True, False])
def test_a_layer_that_nothing_reaches_is_released_or_fitted(has_target: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Any] = []
    counted: list[int] = []
    monkeypatch.setattr(step, "release_", lambda student, found: released.append(found))
    monkeypatch.setattr(step, "fit_weight", lambda *_: (_ for _ in ()).throw(InterruptedError))
    found: Any = SimpleNamespace(name="x", weight=torch.ones(8, 8), matrix=nn.Parameter(torch.ones(8, 8)))
    planned: Any = SimpleNamespace(name="x", block_size=4, kept=lambda matrix: None)
    config = SimpleNamespace(has_target=has_target, distillation=SimpleNamespace(steps=5), em_iterations=1)
    job: Any = SimpleNamespace(
        survey=SimpleNamespace(chosen=[(found, planned)]),
        config=config,
        student=None,
        bar=SimpleNamespace(update=counted.append),
        run=SimpleNamespace(finished=lambda index, layer: None),
        generator=lambda name: torch.Generator(),
    )
    if has_target:
        with pytest.raises(InterruptedError):
            step.treat_unreached(job, 0)
    else:
        outcome = step.treat_unreached(job, 0)
        assert outcome == SkippedLayer(name="x", reason="no calibration input reaches it")
    assert released == ([] if has_target else [found])
    assert counted == [6]


@pytest.mark.parametrize(
    ("fields", "method", "is_asked"),
    [
        ({}, "full", True),
        ({"kind": "conv2d"}, "full", True),
        ({}, "em", False),
        ({"members": 2}, "full", False),
        ({"tied": ("b",)}, "full", False),
        ({"kind": "embedding"}, "full", False),
        ({"kind": "conv_transpose2d"}, "full", False),
    ],
)
def test_a_skip_is_asked_for_behind_plain_layers_of_the_full_method(fields: Any, method: str, is_asked: bool) -> None:
    found: Any = SimpleNamespace(**({"name": "x", "members": 1, "tied": (), "kind": "linear", "rows": 4} | fields))
    walk: Any = object.__new__(Rerun)
    asked: list[str] = []
    values = torch.arange(24.0).reshape(2, 3, 4)
    walk.skip = lambda name: asked.append(name) or (lambda batch: values + batch, lambda batch: -values)
    job: Any = SimpleNamespace(config=SimpleNamespace(method=method))
    skip = step._skip_for_fit(job, walk, found, None)
    assert asked == (["x"] if is_asked else []) and (skip is not None) == is_asked
    if skip is not None:
        is_linear = found.kind == "linear"
        assert torch.equal(skip.drift(1), (values + 1).reshape(6, 4) if is_linear else values + 1)
        assert (skip.stream is not None) == is_linear
        assert skip.stream is None or torch.equal(skip.stream(0), -values.reshape(6, 4))
        assert torch.equal(skip.gain, torch.ones(4))


def test_distilled_codewords_are_rounded_and_steps_of_a_finished_layer_count(tmp_path: Path) -> None:
    steps = bgd.DistillationConfig(steps=6, batch_size=4, learning_rate=0.05)
    config = em(distillation=steps, codebook_storage="int8")
    model = randomized(SmallResNet())
    undistilled = bgd.quantize(model, images(), em(codebook_storage="int8"), progress=False).model.state_dict()
    first = bgd.quantize(model, images(), config, checkpoint=tmp_path, progress=False).model.state_dict()
    again = bgd.quantize(model, images(), config, checkpoint=tmp_path, progress=False).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["fc.codebook"], undistilled["fc.codebook"])
    assert torch.equal(first["fc.codebook"], storable(first["fc.codebook"], "int8"))


@pytest.mark.parametrize("is_hidden", [True, False])
def test_every_place_that_reads_the_weight_is_marked(is_hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[str] = []
    walk: Any = object.__new__(step.Walk)
    walk.mark_changed = marked.append
    monkeypatch.setattr(step, "install_", lambda *_: ["layer"])
    monkeypatch.setattr(step, "_apply_shifts", lambda *_: None)
    found: Any = SimpleNamespace(weight=torch.ones(1), matrix=None, tied=("b", "c"), calls=("x", "y"), hidden=is_hidden)
    planned: Any = SimpleNamespace(target="a", kept=lambda matrix: None)
    fit = FittedLayer(codebook=torch.ones(2, 2), codes=torch.zeros(2, 2, dtype=torch.long))
    job: Any = SimpleNamespace(student=None)
    assert step._installed(job, walk, found, planned, fit) == "layer"  # type: ignore[comparison-overlap]
    assert marked == ["a", "b", "c", *(["x", "y"] if is_hidden else [])]


@pytest.mark.parametrize("method", ["full", "em"])
def test_without_a_graph_only_the_full_method_pairs_inputs(method: str) -> None:
    walk: Any = object.__new__(Rerun)
    walk.inputs = lambda name, *, paired: (name, paired)
    job: Any = SimpleNamespace(config=SimpleNamespace(method=method))
    found: Any = SimpleNamespace(name="x", kind="linear")
    assert step._inputs(job, walk, found) == ("x", method == "full")


@pytest.mark.parametrize("hooked", [None, "0", "1"])
@pytest.mark.parametrize("is_hidden", [True, False])
def test_a_layer_is_watched_where_a_hook_may_change_what_it_reads(
    hooked: str | None, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "LayerInputs", lambda *arguments: arguments)
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if hooked is not None:
        student.get_submodule(hooked).register_forward_pre_hook(lambda *_: None)
    found: Any = SimpleNamespace(
        name="x", kind="linear", target="0", tied=("1", "not there"), calls=("c",), weight="w", hidden=is_hidden
    )
    job: Any = SimpleNamespace(student=student)
    watched = "w" if is_hidden or hooked is not None else None
    assert step._inputs(job, "walk", found) == ("walk", "x", ("c",), watched)  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("affine", [True, False])
def test_a_skip_is_made_good_through_the_gain_of_the_norm_in_between(affine: bool) -> None:
    """γ / √(σ² + eps); the drift is the walk's at the node of the skip."""
    norm = nn.BatchNorm1d(3, eps=0.5, affine=affine)
    norm.running_var.copy_(torch.tensor([0.5, 1.5, 3.5]))  # type: ignore[union-attr]
    if affine:
        norm.weight.data.copy_(torch.tensor([1.0, 2.0, -3.0]))
    job: Any = SimpleNamespace(student=nn.Sequential(norm))
    walk: Any = SimpleNamespace(drift=lambda node, batch: (node, batch))
    skip = DriftedSkip(norm=SimpleNamespace(target="0"), node="node")  # type: ignore[arg-type]
    found = step._skip_for_fit(job, walk, None, skip)  # type: ignore[arg-type]
    assert found is not None and found.drift(3) == ("node", 3) and found.stream is None  # type: ignore[comparison-overlap]
    gamma = torch.tensor([1.0, 2.0, -3.0]) if affine else torch.ones(3)
    torch.testing.assert_close(found.gain, gamma / torch.tensor([1.0, 2.0, 4.0]).sqrt())
    assert step._skip_for_fit(job, walk, None, None) is None  # type: ignore[arg-type]


class _Residual(nn.Module):
    """Two branches that are added to what they read; no trace follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        x = x + self.a(torch.relu(x)) if float(x.abs().max()) > 0 else x
        return x + self.b(torch.relu(x))


def test_a_fit_and_its_shift_know_the_same_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's inputs, random numbers and plan are its own; samples are drawn apart from the fit."""
    fits, shifts, samples = dict[str, Any](), dict[str, Any](), list[torch.Tensor]()
    fit, judged, sampled = step._fit, step._judged_shift, step.sampled_inputs

    def watched(job: Any, found: Any, planned: Any, inputs: Any, generator: Any, skip: Any) -> Any:
        assert planned.name == inputs.name == found.name
        assert torch.equal(generator.get_state(), job.generator(found.name).get_state())
        fits[found.name] = skip
        return fit(job, found, planned, inputs, generator, skip)

    def watched_shift(job: Any, found: Any, fitted: Any, inputs: Any, skip: Any) -> Any:
        shifts[found.name] = skip
        return judged(job, found, fitted, inputs, skip)

    def watched_sample(inputs: Any, rows: int, generator: torch.Generator) -> Any:
        samples.append(generator.get_state())
        return sampled(inputs, rows, generator)

    monkeypatch.setattr(step, "_fit", watched)
    monkeypatch.setattr(step, "_judged_shift", watched_shift)
    monkeypatch.setattr(step, "sampled_inputs", watched_sample)
    small = bgd.LayerConfig(block_size=4, codebook_size=4)
    config = dataclasses.replace(CONFIG, linear=small, first_layer=small)
    bgd.quantize(_Residual().eval(), vectors(5), config, progress=False)
    assert fits.keys() == shifts.keys() == {"first", "a", "b"}
    assert fits["first"] is None and fits["b"] is not None
    assert all(shifts[name] is skip for name, skip in fits.items())
    drawn = [
        torch.equal(state, step.Job.generator(_seeded_job(), name).get_state()) for state in samples for name in fits
    ]
    assert not any(drawn)


def _seeded_job() -> Any:
    return SimpleNamespace(config=CONFIG)
