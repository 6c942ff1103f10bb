"""Networks that do not trace, and layers that hide: they are quantized as any other, and behave as before."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import DistillationConfig, FinetuningConfig, LayerConfig
from tests.networks import em, images, randomized, same_outputs, vectors
from tests.regression.fine import FINE, quantize_finely


class Detector(nn.Module):
    """What makes detectors hard: lists of images, a choice of regions, branches by mode, dicts as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.late = nn.Linear(16, 16)  # held before what runs before it
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.score = nn.Conv2d(16, 4, 1)
        self.classes = nn.Linear(16, 5)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        x = self.body(self.stem(torch.stack([image - image.mean() for image in images])))
        scores = self.score(x).amax(1).flatten(1)
        answers = []
        for features, score in zip(x.flatten(2), scores, strict=True):
            best = score.topk(6).indices
            kept = best[score[best] > score.mean()]
            logits = self.classes(torch.relu(self.late(features[:, kept].T)))
            answers.append({"logits": logits, "places": kept})
        if self.training:
            return {"loss": torch.cat([a["logits"] for a in answers]).square().mean()}
        return answers


def _detector() -> Any:
    return randomized(Detector())


def _lists(batches: int = 3) -> list[tuple[list[Tensor], None]]:
    return [(list(batch), None) for batch in images(batches)]


@pytest.mark.parametrize("method", ["em", "full"])
def test_a_network_that_does_not_trace_keeps_its_class_names_and_behaviour(method: Any, tmp_path: Path) -> None:
    model = _detector()
    result = quantize_finely(model, _lists(), em(method=method, batchnorm="matched"))
    student: Any = result.model
    assert type(student) is Detector
    assert [x.name for x in result.report.layers] == ["body.0", "score", "late", "classes"]
    assert [(x.name, x.reason) for x in result.report.skipped] == [("stem", "first_layer=None")]
    kept = {name for name in model.state_dict() if name in student.state_dict()}
    assert kept | {"body.0.weight", "score.weight", "late.weight", "classes.weight"} == set(model.state_dict())
    assert "loss" in copy.deepcopy(student).train()(_lists()[0][0])
    bgd.save(student, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes
    loaded = bgd.load(tmp_path / "net", like=_detector())
    dense = bgd.materialize(student)
    assert type(dense.classes) is nn.Linear
    with torch.no_grad():
        for (batch, _), other in ((data, net) for data in _lists() for net in (loaded, dense)):
            for mine, theirs in zip(student(batch), other(batch), strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_layers_are_fitted_on_the_inputs_of_the_quantized_ones_before_them() -> None:
    model = _detector()
    result = quantize_finely(model, _lists(), em(overrides=(("classes", None), ("late", None))))
    seen: list[Tensor] = []
    hook = result.model.score.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(2).mT.flatten(0, 1))
    )
    with torch.no_grad():
        for batch, _ in _lists():
            result.model(batch)
    hook.remove()
    rows, weight = torch.cat(seen), model.score.weight.detach().flatten(1)
    lost = rows @ (weight - result.model.score.weight.detach().flatten(1)).T
    expected = float(lost.square().sum() / (rows @ weight.T).square().sum())
    assert {x.name: x.relative_error for x in result.report.layers}["score"] == pytest.approx(expected, rel=1e-4)


def test_batch_norms_are_matched_where_nothing_traces() -> None:
    model = _detector()
    norms = [
        quantize_finely(model, _lists(), em(batchnorm=mode)).model.body[1].running_var for mode in ("keep", "matched")
    ]
    assert torch.equal(norms[0], model.body[1].running_var)
    assert not torch.equal(norms[1], model.body[1].running_var)


def test_the_student_looks_at_the_regions_that_the_float_network_chose() -> None:
    """With the coarsest codebooks the choice of regions differs, and yet inputs can be paired."""
    coarse = LayerConfig(block_size=1, codebook_size=2)
    config = em(method="full", batchnorm="matched", conv=coarse, pointwise_conv=coarse)
    model = _detector()
    result = quantize_finely(model, _lists(), config)
    places = [[a["places"].tolist() for a in net(batch)] for net in (model, result.model) for batch, _ in _lists()]
    assert places[:3] != places[3:]
    assert not any("another branch" in note for note in result.report.notes)


def test_training_runs_where_nothing_traces() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = torch.relu(self.a(x))
            return {"logits": self.c(torch.relu(self.b(x)) if x.sum() > 0 else x)}

    config = em(distillation=DistillationConfig(steps=4, batch_size=8), finetuning=FinetuningConfig(steps=4))
    plain, trained = (quantize_finely(Branching(), vectors(), c).model for c in (em(), config))
    assert any(not torch.equal(x, y) for x, y in zip(plain.parameters(), trained.parameters(), strict=True))


def test_a_detector_is_finetuned_on_what_its_modules_give() -> None:
    coarse = LayerConfig(block_size=4, codebook_size=2)
    config = em(linear=coarse, pointwise_conv=coarse)
    model, losses = _detector(), []
    for steps in (1, 60):
        finetuning = FinetuningConfig(steps=steps, outputs=("body", "score", "classes"), learning_rate=0.03)
        notes = quantize_finely(model, _lists(), replace(config, finetuning=finetuning)).report.notes
        losses.append(float(notes[-1].rpartition(" → ")[2]))
    assert losses[1] < 0.8 * losses[0]


def test_outputs_that_match_no_module_are_an_error() -> None:
    config = em(finetuning=FinetuningConfig(steps=1, outputs=("bodies",)))
    with pytest.raises(bgd.errors.ConfigError, match="outputs: 'bodies' matches no module"):
        quantize_finely(_detector(), _lists(), config)


def test_a_layer_that_no_input_reaches_stays_float_with_the_reason(tmp_path: Path) -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.never, self.last = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.never(x) if x.mean() > 1e6 else x)

    model = Rare()
    result = quantize_finely(model, vectors())
    assert [x.name for x in result.report.layers] == ["last"]
    assert ("never", "no calibration input reaches it") in [(x.name, x.reason) for x in result.report.skipped]
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=model), vectors())


def test_mappings_go_in_and_out() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, **rest: Any) -> dict[str, Tensor]:
            if ids is None:
                raise ValueError("ids are needed")
            x = self.a(self.embed(ids))
            return {"states": self.b(x if mask is None or bool(mask.all()) else x * mask[..., None])}

    data = [{"ids": torch.randint(0, 20, (2, 7)), "mask": torch.ones(2, 7)} for _ in range(3)]
    model = Keyed().eval()
    result = quantize_finely(model, data, em(linear=FINE))
    assert [x.name for x in result.report.layers] == ["a", "b"]
    out, exact = (net(**data[0])["states"].detach() for net in (result.model, model))
    assert float((out - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["em", "full"])
def test_a_network_in_half_precision(dtype: torch.dtype, method: Any, tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())).to(dtype)
    data = [batch.to(dtype) for batch in images()]
    result = quantize_finely(model, data, em(method=method, batchnorm="matched"))
    student: Any = result.model
    assert student.get_submodule("1").codebook.dtype == dtype
    assert student(data[0]).dtype == dtype
    bgd.save(student, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes
    assert same_outputs(student, bgd.load(tmp_path / "net", like=model), data)


def test_hooks_stay_where_they_were() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16))
    model[1].register_forward_hook(lambda module, args, output: output + 1000)
    assert float(quantize_finely(model, vectors()).model(vectors()[0]).detach().min()) > 500


def test_dropout_in_training_mode_does_not_touch_calibration() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.9), nn.Linear(16, 16))
    fitted = [
        quantize_finely(net, vectors()).model.get_submodule("2").codebook for net in (model.eval(), model.train())
    ]
    assert torch.equal(*fitted)
