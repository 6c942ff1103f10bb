"""What the walk over all layers is told, and what it tells."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.quantization import layerwise, leftovers
from bgd_plugin.quantization.layerwise import _drifted_skip, _needs_reference
from tests.networks import em, randomized, vectors

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
    assert given == [{"finishes": distilled}]
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
    job: Any = SimpleNamespace(student=student, config=config, generator=lambda name: None)
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
