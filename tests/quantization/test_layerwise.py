"""What the walk over all layers is told, and what it tells."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Batch
from bgd_plugin.planning.types import PlannedLayer, SkippedLayer
from bgd_plugin.quantization import layerwise, leftovers
from bgd_plugin.quantization.layerwise import _drifted_skip, _needs_reference
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.support.log import Log
from tests.networks import NormedBranch, em, images, randomized, vectors

CONFIG = bgd.BGDConfig(max_divergence=None, kept_aside=0.0)


class _Branching(nn.Module):
    """No trace follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.a = nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.after, self.head = nn.BatchNorm1d(32), nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.a(torch.relu(self.norm(self.stem(x)))))
        return self.head(torch.relu(y)) if float(x.abs().max()) > 0 else y


@pytest.mark.parametrize("distilled", [True, False])
def test_without_a_graph_the_run_knows_what_follows(distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    compared: list[list[str]] = []
    real = layerwise.Rerun

    def watched(*arguments: Any, **fields: Any) -> Any:
        given.append(fields)
        return real(*arguments, **fields)

    monkeypatch.setattr(layerwise, "Rerun", watched)
    monkeypatch.setattr(layerwise, "require_same_layers", lambda order: compared.append(list(order)))
    config = dataclasses.replace(
        CONFIG, distillation=bgd.DistillationConfig(steps=1, batch_size=4) if distilled else None
    )
    report = bgd.quantize(randomized(_Branching()), vectors(4), config, progress=False).report
    assert given == [{"finishes": distilled, "records": None}]
    assert [name for name in compared[0] if name in ("a", "after", "head")] == ["a", "after", "head"]
    assert any("batch norm" in note for note in report.notes)
    assert report.seconds["forward"] > 0


@pytest.mark.parametrize(
    ("fields", "is_asked"),
    [({}, True), ({"method": "em"}, False), ({"asymmetric_step": 0.0}, False), ({"batchnorm": "keep"}, False)],
)
def test_a_drift_is_looked_for_where_the_target_can_make_it_good(fields: dict[str, Any], is_asked: bool) -> None:
    asked: list[Any] = []
    student = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    config = dataclasses.replace(CONFIG, **fields)
    job: Any = SimpleNamespace(config=config, student=student, batchnorm_after=lambda found: asked.append(found))
    found: Any = SimpleNamespace(calls=("_0",))
    assert _drifted_skip(job, None, found) is None  # type: ignore[arg-type]
    assert asked == ([found] if is_asked else [])


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, True),
        ({"method": "em"}, True),
        ({"batchnorm": "keep"}, True),
        ({"method": "em", "batchnorm": "keep"}, False),
    ],
)
def test_the_float_network_runs_beside_where_something_is_compared_with_it(fields: Any, needs: bool) -> None:
    assert _needs_reference(dataclasses.replace(CONFIG, **fields)) == needs


@pytest.mark.parametrize(
    ("fields", "differs", "width", "is_refitted"),
    [
        ({}, True, 1, True),
        ({"refit_depthwise": False}, True, 1, False),
        ({"method": "em"}, True, 1, False),
        ({}, False, 1, False),
        ({}, True, 2, False),
    ],
)
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_leftover_is_refitted_rounded_and_marked(
    fields: Any, differs: bool, width: int, is_refitted: bool, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4 // width)))
    call = next(node for node in student.graph.nodes if node.op == "call_module")
    before, new = student.get_parameter("0.weight").detach().clone(), torch.full((4, width, 3, 3), 0.5)
    monkeypatch.setattr(leftovers, "LayerInputs", lambda *_: None)
    monkeypatch.setattr(leftovers, "refitted", lambda *_: SimpleNamespace(weight=new, gain="gain", gram=None))
    marked: list[str] = []
    walk: Any = SimpleNamespace(differs_at=lambda node: differs, mark_changed=marked.append)
    config = dataclasses.replace(CONFIG, weight_storage=storage, **fields)
    survey = SimpleNamespace(storages={"0.weight": storage})
    job: Any = SimpleNamespace(student=student, config=config, survey=survey, generator=lambda name: None)
    gain = leftovers.treat_leftover(job, walk, "0.weight", call)
    assert gain == ("gain" if is_refitted else None)
    assert marked == (["0"] if is_refitted or storage == "int8" else [])
    found, expected = student.get_parameter("0.weight"), new if is_refitted else before
    assert torch.equal(found, expected) == (storage == "float32")
    torch.testing.assert_close(found.detach(), expected, rtol=0.02, atol=2e-3)


def test_samples_are_kept_aside_and_notes_of_the_survey_reach_the_report() -> None:
    data = vectors(4)
    for share in (0.25, 0.0):
        report = bgd.quantize(
            randomized(_Branching()), data, bgd.BGDConfig(max_divergence=None, kept_aside=share), progress=False
        ).report
        assert report.answers is not None and report.answers.kept_aside == (share > 0)
        assert report.answers.samples == (8 if share else 32)
        assert any("graph" in note or "trace" in note for note in report.notes)


def test_masks_of_pruning_are_baked_in() -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    nn.utils.prune.l1_unstructured(model[2], "weight", 0.5)
    result = bgd.quantize(model, vectors(), em(), progress=False).model
    assert not [name for name in result.state_dict() if name.endswith(("_orig", "_mask"))]
    assert hasattr(model[2], "weight_orig")


@pytest.mark.parametrize("step", ["distillation", "reconstruction", "finetuning"])
def test_training_needs_data(step: str) -> None:
    kinds: dict[str, Any] = {
        "distillation": bgd.DistillationConfig(steps=1),
        "reconstruction": bgd.ReconstructionConfig(steps=1),
        "finetuning": bgd.FinetuningConfig(steps=1),
    }
    with pytest.raises(bgd.errors.ConfigError, match=f"{step}: training needs data"):
        bgd.quantize_weights(nn.Linear(8, 8), dataclasses.replace(CONFIG, **{step: kinds[step]}))


class _Residual(nn.Module):
    """Branches that end in a norm, in a norm that nothing is added to, and in a layer without one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.other = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        x = x + self.norm(self.a(x))
        return self.c(torch.relu(self.other(self.b(x))))


@pytest.mark.parametrize(
    ("layer", "differs", "expected"),
    [("a", True, ("norm", "tanh")), ("a", False, None), ("b", True, None), ("c", True, None)],
)
def test_a_skip_counts_if_it_has_run_and_differs(layer: str, differs: bool, expected: Any) -> None:
    student = torch.fx.symbolic_trace(_Residual().eval())
    asked: list[str] = []
    walk: Any = SimpleNamespace(differs=lambda node: asked.append(node.name) or differs)
    after = {"a": "norm", "b": "other"}
    job: Any = SimpleNamespace(config=CONFIG, student=student, batchnorm_after=lambda found: after.get(found.target))
    found: Any = SimpleNamespace(calls=(layer,), target=layer)
    skip = _drifted_skip(job, walk, found)
    assert (None if skip is None else (skip.norm.target, skip.node.name)) == expected
    assert asked == (["tanh"] if layer == "a" else [])


def test_a_layer_is_met_at_its_first_call_or_where_a_layer_tied_to_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.table.weight
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.linear(self.table(x), self.kernel))

    walk: Any = SimpleNamespace(order=list(torch.fx.symbolic_trace(Tied()).graph.nodes))
    for target, tied, calls, expected in (
        ("head", ("table",), ("head",), "table"),
        ("table", ("head",), ("head",), "table"),
        ("head", (), ("head",), "head"),
        ("kernel", (), ("linear",), "linear"),
    ):
        found: Any = SimpleNamespace(name=target, target=target, tied=tied, calls=calls)
        assert layerwise._first_node(walk, found) == expected


def test_a_teacher_answers_each_batch_once_and_only_for_distillation() -> None:
    batches = [Batch((x,)) for x in vectors()]
    teacher = nn.Linear(12, 5)
    log = Log()
    distilled = dataclasses.replace(CONFIG, distillation=bgd.DistillationConfig(steps=1))
    job: Any = SimpleNamespace(config=distilled, teacher=teacher, batches=batches, log=log)
    logits = layerwise._teacher_logits(job)
    assert all(torch.equal(x, teacher(b.args[0])) for x, b in zip(logits, batches, strict=True))
    assert not any(x.requires_grad for x in logits) and "teacher" in log.seconds
    job.config = CONFIG
    assert layerwise._teacher_logits(job) == []
    job.config, job.teacher = distilled, None
    assert layerwise._teacher_logits(job) == []


def test_what_shifts_of_biases_gain_is_said_by_the_middle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(gain: float | None) -> Any:
        names: dict[str, Any] = dict.fromkeys(("name", "target", "kind", "family"), "a")
        planned = PlannedLayer(**names, weight_shape=(8, 8), block_size=4, codebook_size=4, calls=())
        return LayerReport.of(planned, relative_error=0.1, bias_gain=gain)

    outcomes = [layer(0.01), layer(None), layer(0.05), SkippedLayer(name="b", reason="c"), layer(0.03)]
    student = nn.Linear(2, 2)
    monkeypatch.setattr(layerwise, "_by_runs", lambda job, logits: outcomes)
    job: Any = SimpleNamespace(student=student, config=CONFIG, log=Log(), teacher=None)
    assert layerwise.quantize_layers(job) == outcomes and not student.weight.requires_grad
    assert job.log.notes == ["bias (matched): 3 corrected; median output error down by 3.00% of the variance"]
    outcomes[:] = [layer(None)]
    job.log = Log()
    layerwise.quantize_layers(job)
    assert job.log.notes == []


def test_depthwise_layers_that_were_refitted_are_told() -> None:
    layers = (nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Tanh(), nn.Conv2d(16, 16, 3, groups=16))
    model = randomized(nn.Sequential(*layers, nn.BatchNorm2d(16)))
    config = dataclasses.replace(CONFIG, rounds=0)
    report = bgd.quantize(model, images(), config, progress=False).report
    assert any(note.startswith("1 depthwise convolutions refitted to the quantized") for note in report.notes)
    kept = bgd.quantize(model, images(), dataclasses.replace(config, refit_depthwise=False), progress=False).report
    assert not any("refitted" in note for note in kept.notes)


def test_every_norm_is_corrected_and_knows_what_the_layer_before_it_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, Any]] = []

    class Watched(layerwise.NormCorrection):
        def remember(self, skip: Any) -> None:
            said.append(("remembered", None if skip is None else (skip.norm.target, skip.node.name)))
            super().remember(skip)

        def correct_(self, walk: Any, node: Any) -> None:
            said.append(("corrected", node.target))
            super().correct_(walk, node)

    monkeypatch.setattr(layerwise, "NormCorrection", Watched)
    small = bgd.LayerConfig(block_size=1, codebook_size=4)
    config = dataclasses.replace(CONFIG, first_layer=small, pointwise_conv=small)
    bgd.quantize(randomized(NormedBranch()), images(), config, progress=False)
    assert said == [
        ("remembered", None),
        ("remembered", ("norm", "tanh")),
        ("corrected", "norm"),
        ("corrected", "last"),
    ]
