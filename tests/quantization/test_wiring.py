"""What one step of a run leaves to the next: marks, shifts, rounding, progress, times, and what the report repeats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, DistillationConfig, FinetuningConfig, LayerConfig, ReconstructionConfig
from bgd_plugin.fitting import method_full_gram as full_gram
from bgd_plugin.quantization import layer as layer_step
from tests.networks import PlainNet, SmallResNet, em, images, randomized, vectors

_SMALL = LayerConfig(block_size=4, codebook_size=8)


def _config(**fields: Any) -> BGDConfig:
    storage = {
        "codebook_storage": "float16",
        "weight_storage": "float32",
        "float_storage": "float32",
        "kept_aside": 0.0,
    }
    kinds = {"conv": LayerConfig(block_size=9, codebook_size=8), "pointwise_conv": _SMALL, "linear": _SMALL}
    return BGDConfig(**(kinds | storage | fields), max_divergence=None)


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that the fit is asked for, layer after layer."""
    real, seen = full_gram.fit_full, list[Tensor]()

    def watched(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(weight.clone())
        return real(weight, *args, **kwargs)

    monkeypatch.setattr(full_gram, "fit_full", watched)
    return seen


@torch.no_grad()
def _inputs(network: nn.Module, path: str, data: list[Tensor]) -> Tensor:
    """Rows that go into a linear layer, float64 `[n, columns]`."""
    seen: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].double().clone()))
    for batch in data:
        network(batch)
    hook.remove()
    return torch.cat(seen)


def _target(weight: Tensor, x: Tensor, theirs: Tensor) -> Tensor:
    """Half a step from W to the ridge solution, for a linear layer with a bias."""
    w = weight.detach().double()
    y = theirs @ w.T
    x, y = x - x.mean(0), y - y.mean(0)
    h = x.T @ x / len(x)
    damping = min(1.0, 0.2 * (1 + x.shape[1] / len(x)))
    ridge = h + damping * h.diag().mean() * torch.eye(len(h), dtype=h.dtype)
    return w + 0.5 * torch.linalg.solve(ridge, x.T @ (y - x @ w.T) / len(x)).T


class _Parallel(nn.Module):
    """Two layers share a weight, each with a bias of its own; what follows the second never sees the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(12, 32)
        self.b.weight = self.a.weight
        self.c, self.d = nn.Linear(32, 24), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return self.d(torch.tanh(self.a(x))) + self.c(torch.tanh(self.b(x)))


def test_a_weight_that_two_layers_share_is_changed_at_both(targets: list[Tensor]) -> None:
    """The layer behind the second one is fitted to what the quantized weight gives there."""
    model, data = _Parallel().eval(), vectors(5, batch=20)
    result = bgd.quantize(model, data, _config(first_layer=_SMALL), progress=False)
    names = [layer.name for layer in result.report.layers]
    for name in ("c", "d"):
        mine, theirs = (_inputs(net, name, data) for net in (result.model, model))
        assert float((mine - theirs).abs().max()) > 1e-3
        expected = _target(model.get_submodule(name).weight, mine, theirs)  # type: ignore[arg-type]
        torch.testing.assert_close(targets[names.index(name)].double(), expected, rtol=2e-3, atol=2e-5)


def test_a_shift_of_the_bias_reaches_every_layer_that_shares_the_weight() -> None:
    """By what the mean over the inputs of both calls asks for."""
    model, data = _Parallel().eval(), vectors(5, batch=20)
    result = bgd.quantize(model, data, _config(first_layer=_SMALL, asymmetric_step=0.0), progress=False).model
    weight = result.get_submodule("a").weight.detach().double()  # type: ignore[union-attr,operator]
    lost = model.a.weight.detach().double() - weight
    x = torch.cat([_inputs(model, name, data) for name in ("a", "b")])
    for name in ("a", "b"):
        shift = result.get_submodule(name).bias - model.get_submodule(name).bias  # type: ignore[operator]
        torch.testing.assert_close(shift.detach().double(), lost @ x.mean(0), rtol=2e-3, atol=2e-5)


def test_a_layer_behind_a_rounded_first_layer_is_fitted_to_the_rounded_ones_outputs(targets: list[Tensor]) -> None:
    model, data = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 24)).eval(), vectors(5, batch=20)
    result = bgd.quantize(model, data, _config(weight_storage="int8"), progress=False).model
    assert not torch.equal(result.get_submodule("0").weight, model[0].weight)
    mine, theirs = (_inputs(net, "2", data) for net in (result, model))
    plain, expected = model[2].weight.detach().double(), _target(model[2].weight, mine, theirs)  # type: ignore[arg-type]
    torch.testing.assert_close(targets[0].double(), expected, rtol=0, atol=0.05 * float((expected - plain).abs().max()))


@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_the_bias_is_shifted_for_the_codewords_that_are_stored(storage: Any) -> None:
    """Zeros that stay included: where the decoded weight is masked, codewords count for nothing."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 24)).eval()
    model[2].weight.data *= torch.rand(24, 16) > 0.5
    data = [x + 2 for x in vectors(5, batch=20)]
    for zeros in (False, True):
        config = _config(codebook_storage=storage, preserve_zeros=zeros, overrides=(("0", None),))
        result = bgd.quantize(model, data, config, progress=False).model
        layer: Any = result.get_submodule("2")
        with torch.no_grad():
            found, exact = (torch.cat([net(x) for x in data]).double().mean(0) for net in (result, model))
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-6)
        assert bool((layer.weight == 0).any()) == zeros


class _Functional(nn.Module):
    """A depthwise convolution by a function, on a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.kernel = nn.Parameter(torch.randn(16, 1, 3, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.tanh(self.wide(self.stem(x))), self.kernel, groups=16)


def test_a_depthwise_convolution_by_a_function_is_refitted_and_rounded_too() -> None:
    model, data = _Functional().eval(), images(4, batch=8)
    plain, refitted, rounded = (
        bgd.quantize(model, data, _config(**fields), progress=False)
        for fields in ({"refit_depthwise": False}, {}, {"weight_storage": "int8", "refit_depthwise": False})
    )
    assert torch.equal(plain.model.get_parameter("kernel"), model.kernel)
    assert any("1 depthwise" in note for note in refitted.report.notes)
    assert not torch.equal(rounded.model.get_parameter("kernel"), model.kernel)
    with torch.no_grad():
        lost = [sum(float((result.model(x) - model(x)).square().sum()) for x in data) for result in (plain, refitted)]
    assert lost[1] < lost[0]


# --- progress, times, report

_EVERYTHING: dict[str, Any] = {
    "distillation": DistillationConfig(steps=3, batch_size=8, learning_rate=0.01),
    "reconstruction": ReconstructionConfig(steps=4, batch_size=8),
    "finetuning": FinetuningConfig(steps=5),
}


def _ends_complete(said: str) -> bool:
    """The last count is the total; beyond it a bar would count without one, "9it"."""
    counts = re.findall(r"(\d+)/(\d+) \[", said)
    return (
        not re.search(r"\dit \[", said) and bool(counts) and counts[-1][0] == counts[-1][1] and int(counts[-1][1]) > 0
    )


@pytest.mark.parametrize("fields", [{}, *({name: _EVERYTHING[name]} for name in _EVERYTHING), _EVERYTHING])
def test_the_bar_counts_every_step_and_a_resumed_run_counts_the_same(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = randomized(SmallResNet()), images()
    totals = []
    for _ in range(2):
        bgd.quantize(model, data, em(**fields), checkpoint=tmp_path / "run", progress=True)
        said = capsys.readouterr().err
        assert _ends_complete(said), said[-200:]
        totals.append(re.findall(r"/(\d+) \[", said)[-1])
    assert totals[0] == totals[1]


def test_the_report_has_the_seconds_of_each_step() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, groups=64)))
    model = nn.Sequential(*model, nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 50)).eval()
    report = bgd.quantize(model, images(), BGDConfig(target_ratio=2, **_EVERYTHING), progress=False).report
    steps = {"budget", "teacher", "statistics", "fit", "distill", "refit", "batch norm", "forward"}
    assert {*steps, "reconstruct", "finetune"} <= set(report.seconds)
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_the_report_repeats_the_plan() -> None:
    model, config = randomized(SmallResNet()), em(overrides=(("down", None),))
    plan, report = bgd.plan(model, config), bgd.quantize(model, images(), config, progress=False).report
    assert report.skipped == plan.skipped
    assert (report.original_bytes, report.compressed_bytes) == (plan.original_bytes, plan.compressed_bytes)
    assert report.paper_bytes == plan.paper_bytes
    assert isinstance(report.notes, tuple) and isinstance(report.layers, tuple)
    for planned, layer in zip(plan.layers, report.layers, strict=True):
        for field in ("name", "kind", "block_size", "codebook_size", "weights", "bits_per_weight", "compressed_bytes"):
            assert getattr(layer, field) == getattr(planned, field), field
        assert planned.note in layer.note


def test_a_teacher_that_nothing_follows_is_said_to_be_of_no_use() -> None:
    result = bgd.quantize(PlainNet(), vectors(), em(), teacher=PlainNet(), progress=False)
    assert any(note.startswith("the teacher was not used") for note in result.report.notes)


@pytest.mark.parametrize("step", ["distillation", "finetuning"])
def test_a_teacher_answers_in_evaluation_mode_and_keeps_its_own(step: str) -> None:
    """Dropout and statistics of the batch would make other logits."""
    teacher = randomized(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 5)))
    model, codebooks = PlainNet(), []
    for mode in (True, False):
        teacher.train(mode)
        config = em(**{step: _EVERYTHING[step]})
        net = bgd.quantize(model, vectors(), config, teacher=teacher, progress=False).model
        codebooks.append([value for name, value in net.state_dict().items() if name.endswith("codebook")])
        assert teacher[1].training == mode
    assert all(map(torch.equal, *codebooks))


def test_a_folder_for_progress_is_made_with_those_above_it(tmp_path: Path) -> None:
    bgd.quantize(PlainNet(), vectors(), em(), checkpoint=tmp_path / "a" / "b", progress=False)
    assert (tmp_path / "a" / "b" / "run.json").exists()


@pytest.mark.parametrize("step", ["distillation", "finetuning"])
def test_a_teacher_of_another_number_of_classes_is_refused_before_any_work(step: str) -> None:
    with pytest.raises(bgd.BGDError):
        bgd.quantize(
            PlainNet(), vectors(), em(**{step: _EVERYTHING[step]}), teacher=PlainNet(classes=7), progress=False
        )


class _Numbered(list[Tensor]):
    """Data that is told the number of each walk."""

    def __init__(self, items: list[Tensor]) -> None:
        super().__init__(items)
        self.numbers: list[int] = []

    def set_epoch(self, number: int) -> None:
        """As a sampler has it."""
        self.numbers.append(number)


def test_each_walk_of_finetuning_has_its_number() -> None:
    data = _Numbered(vectors())
    bgd.quantize(PlainNet(), data, em(finetuning=FinetuningConfig(epochs=3)), progress=False)
    assert data.numbers == [1, 2, 3]


# --- samples kept aside


@pytest.mark.parametrize("fields", [{}, {"kept_aside": 0.0}, {"finetuning": FinetuningConfig(steps=2)}])
def test_the_report_says_how_the_network_that_is_saved_answers(fields: dict[str, Any]) -> None:
    """On every eighth sample or so, which the fit has not seen; without them on the first 32."""
    model, data = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 24)).eval(), vectors(5, batch=20)
    model[2].weight.data *= 4
    report, net = (lambda r: (r.report, r.model))(
        bgd.quantize(model, data, BGDConfig(**fields, max_divergence=None), progress=False)
    )
    x = torch.cat(data)
    places = range(32) if "kept_aside" in fields else [int((p + 0.5) * 100 / 12) for p in range(12)]
    with torch.no_grad():
        mine, theirs = (net(x[list(places)]).double(), model(x[list(places)]).double())
    p, q = theirs.log_softmax(1), mine.log_softmax(1)
    answers = report.answers
    assert answers.samples == len(places) and answers.kept_aside == (not fields)
    assert answers.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert answers.agreement == pytest.approx(float((mine.argmax(1) == theirs.argmax(1)).double().mean()))
    assert str(answers) in str(report)


class _Attending(nn.Module):
    """An attention whose projections no node shows, before an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.last = nn.Linear(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_a_layer_behind_one_that_no_node_shows_is_fitted_to_its_outputs(targets: list[Tensor]) -> None:
    model, data = _Attending().eval(), [torch.randn(4, 5, 12) for _ in range(5)]
    result = bgd.quantize(model, data, _config(first_layer=_SMALL), progress=False)
    names = [layer.name for layer in result.report.layers]
    assert "attention.in_proj_weight" in names
    mine, theirs = (_inputs(net, "last", data).flatten(0, 1) for net in (result.model, model))
    assert float((mine - theirs).abs().max()) > 1e-3
    expected = _target(model.last.weight, mine, theirs)
    torch.testing.assert_close(targets[names.index("last")].double(), expected, rtol=2e-3, atol=2e-5)


def test_answers_are_those_in_evaluation_mode_whatever_mode_the_network_is_in() -> None:
    layers = nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 5)
    model, found = randomized(nn.Sequential(*layers)), []
    for mode in (False, True):
        report = bgd.quantize(model.train(mode), vectors(5), BGDConfig(rounds=1), progress=False).report
        found.append((report.answers, report.layers))
    assert found[0] == found[1]


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_of_a_budget_can_be_turned_off_too(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    bgd.quantize(model, vectors(), BGDConfig(target_ratio=3, rounds=1), progress=progress)
    assert ("measure" in capsys.readouterr().err) == progress


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite_are_named(name: str) -> None:
    model = randomized(SmallResNet())
    getattr(model.bn2, name)[3] = float("nan")
    with pytest.raises(bgd.BGDError, match=f"'bn2.{name}' of the network contains NaN"):
        bgd.quantize(model, images(), em(), progress=False)


class _Branching(PlainNet):
    """Does not trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool((x == x).all()) else -x)


def test_without_a_graph_the_bar_counts_the_steps_of_reconstruction_too(capsys: pytest.CaptureFixture[str]) -> None:
    config = em(reconstruction=ReconstructionConfig(steps=4, batch_size=8))
    bgd.quantize(_Branching().eval(), vectors(), config, progress=True)
    said = capsys.readouterr().err
    assert _ends_complete(said), said[-200:]
    assert int(re.findall(r"/(\d+) \[", said)[-1]) >= 2 + 4


class _Unreached(nn.Module):
    """A layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.never, self.head = nn.Linear(12, 64), nn.Linear(64, 64), nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.never(x) if float(x.detach().sum()) < 0 else x)


def test_a_layer_out_of_reach_keeps_its_zeros_and_is_fitted_once(tmp_path: Path, monkeypatch: Any) -> None:
    """Within a budget, which counts on its bytes."""
    model = _Unreached().eval()
    model.never.weight.data *= torch.rand(64, 64) > 0.5
    config = _config(target_ratio=3, preserve_zeros=True, linear=LayerConfig())
    fits, real = list[str](), layer_step.fit_weight

    def watched(weight: Tensor, *args: Any) -> Any:
        fits.append(args[1].name)
        return real(weight, *args)

    monkeypatch.setattr(layer_step, "fit_weight", watched)
    results = [bgd.quantize(model, vectors(5), config, checkpoint=tmp_path / "run", progress=False) for _ in range(2)]
    assert fits == ["never"]
    found: Any = results[0].model.get_submodule("never")
    assert torch.equal(found.weight != 0, model.never.weight != 0)
    rows = [next(row for row in result.report.layers if row.name == "never") for result in results]
    assert rows[0] == rows[1] and "no calibration input reaches it" in rows[0].note
    lost = (found.weight - model.never.weight).detach().norm() / model.never.weight.detach().norm()
    assert rows[0].relative_error == pytest.approx(float(lost) ** 2, rel=1e-4)
