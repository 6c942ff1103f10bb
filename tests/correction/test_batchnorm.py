"""Batch-norm correction: the student's output keeps the float network's mean and variance, and nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.correction import absorb_row_scale_, batchnorm, gain, row_scale_bounds
from bgd_plugin.errors import CalibrationError
from tests.networks import PlainNet, SmallResNet, em, images, randomized, vectors

NORMS = ("bn1", "bn2", "bn3")


def _moments(model: nn.Module, name: str, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance, by channel, of what comes out of a module on the data."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    with torch.no_grad():
        for batch in data:
            model(batch)
    hook.remove()
    values = torch.cat(seen).double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, unbiased=False)


def _quantized(model: nn.Module, data: list[Tensor], mode: Any) -> Any:
    return bgd.quantize(model, data, em(batchnorm=mode), progress=False).model


@pytest.mark.parametrize("name", NORMS)
def test_matched_outputs_keep_their_mean_and_variance(name: str) -> None:
    model, data = randomized(SmallResNet()), images(3, batch=8)
    (mean, variance), (found_mean, found_variance) = (
        _moments(net, name, data) for net in (model, _quantized(model, data, "matched"))
    )
    torch.testing.assert_close(found_mean, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_variance, variance, rtol=1e-2, atol=1e-5)


def test_uncorrected_outputs_drift() -> None:
    model, data = randomized(SmallResNet()), images(3, batch=8)
    (mean, _), (found, _) = (_moments(net, "bn2", data) for net in (model, _quantized(model, data, "keep")))
    assert float((found - mean).abs().max()) > 1e-2


class _NoGraph(SmallResNet):
    """Its code looks at a value, which no trace follows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool((x == x).all()) else -x)


@pytest.mark.parametrize("build", [SmallResNet, _NoGraph])
def test_reestimated_outputs_are_normalized(build: Any) -> None:
    model, data = randomized(build()), images(3, batch=8)
    mean, variance = _moments(_quantized(model, data, "reestimate"), "bn2", data)
    torch.testing.assert_close(mean, model.bn2.bias.detach().double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(variance.sqrt(), model.bn2.weight.detach().abs().double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["matched", "reestimate"])
def test_nothing_but_the_statistics_behind_a_quantized_layer_moves(mode: Any) -> None:
    model, data = randomized(SmallResNet()), images()
    state = _quantized(model, data, mode).state_dict()
    moved = {
        name for name, value in model.state_dict().items() if name in state and not torch.equal(state[name], value)
    }
    assert moved == {f"{norm}.{part}" for norm in ("bn2", "bn3") for part in ("running_mean", "running_var")}


def test_keep_moves_nothing() -> None:
    model, data = randomized(SmallResNet()), images()
    state = _quantized(model, data, "keep").state_dict()
    assert all(torch.equal(state[f"{n}.running_mean"], model.get_submodule(n).running_mean) for n in NORMS)


def test_statistics_that_are_far_from_the_calibration_data_stay_the_reference() -> None:
    """Calibration data of another scale than the training set's: only the change is carried over."""
    model, data = randomized(SmallResNet()), [3 * batch + 1 for batch in images(3)]
    found = _quantized(model, data, "matched")
    seen = _quantized(model, data, "reestimate")
    distance = (found.bn2.running_var / model.bn2.running_var).log().abs().mean()
    assert float(distance) < 0.5 * float((seen.bn2.running_var / model.bn2.running_var).log().abs().mean())


@pytest.mark.parametrize("mode", ["matched", "reestimate"])
def test_dead_channels_survive(mode: Any) -> None:
    """A channel whose every input weight is zero, and one that a batch norm before it has killed."""
    model = randomized(SmallResNet())
    model.conv1.weight.data[3] = 0
    model.bn1.weight.data[2], model.bn1.bias.data[2] = 0.0, -1.0
    data = images()
    result = _quantized(model, data, mode)
    state = [value for value in result.state_dict().values() if value.is_floating_point()]
    assert all(bool(torch.isfinite(value).all()) for value in state)
    assert bool((result.bn2.running_var >= 0).all())
    assert all(bool(torch.isfinite(result(batch)).all()) for batch in data)


def test_one_image_is_enough() -> None:
    model = randomized(SmallResNet())
    result = _quantized(model, images(1, batch=1), "matched")
    assert all(bool(torch.isfinite(result(batch)).all()) for batch in images())


@pytest.mark.parametrize(
    ("net", "data"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)), vectors()),
        (
            lambda: nn.Sequential(nn.Conv3d(2, 8, 1), nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8)),
            [torch.randn(2, 2, 3, 3, 3) for _ in range(2)],
        ),
    ],
)
def test_other_dimensions_are_corrected_too(net: Any, data: list[Tensor]) -> None:
    model = randomized(net())
    (mean, _), (found, _) = (_moments(n, "2", data) for n in (model, _quantized(model, data, "matched")))
    torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-4)


def _notes(model: nn.Module, data: list[Tensor], mode: Any) -> str:
    return " ".join(bgd.quantize(model, data, em(batchnorm=mode), progress=False).report.notes)


def test_the_report_says_how_many_were_corrected() -> None:
    assert "batch norm (matched): 2 corrected" in _notes(randomized(SmallResNet()), images(), "matched")


def test_a_network_without_batch_norm_says_so() -> None:
    assert "batch norm (matched): nothing to correct" in _notes(PlainNet(), vectors(), "matched")
    assert "batch norm" not in _notes(PlainNet(), vectors(), "keep")


def test_batch_norms_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), nn.BatchNorm1d(16, track_running_stats=False)).eval()
    assert "nothing to correct" in _notes(model, vectors(), "matched")


def test_the_users_batch_norms_stay_as_they_were() -> None:
    model = randomized(SmallResNet())
    before = copy.deepcopy(model.state_dict())
    _quantized(model, images(), "matched")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [0.0, 1e-12, 1.0, 1e30])
def test_scales_within_the_bounds_can_be_taken_out_of_the_statistics(value: float) -> None:
    """The variance stays above zero and finite at both ends, and so does the mean."""
    norm = nn.BatchNorm2d(4).eval()
    norm.running_var.fill_(value)  # type: ignore[union-attr,operator]
    norm.running_mean.copy_(torch.tensor([0.0, 1e-6, 3.0, 1e8]))  # type: ignore[union-attr,operator]
    for bound in row_scale_bounds(norm):
        other = copy.deepcopy(norm)
        absorb_row_scale_(other, bound)
        assert bool((other.running_var > 0).all()) and bool(torch.isfinite(other.running_var).all())
        assert bool(torch.isfinite(other.running_mean).all())


def test_a_norm_whose_variance_is_next_to_zero_bounds_the_scale_of_the_rows() -> None:
    """Rows with large outputs would want a scale that no variance above zero takes out again."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)))
    model[1].weight.data *= 100
    model[2].running_var.data.zero_()
    data = images()
    result = bgd.quantize(
        model,
        data,
        bgd.BGDConfig(batchnorm="keep", float_storage="float32", kept_aside=0.0, max_divergence=None),
        progress=False,
    ).model
    norm: Any = result.get_submodule("2")
    assert bool((norm.running_var > 0.5 * norm.eps).all())
    with torch.no_grad():
        exact, found = (torch.cat([net(x) for x in data]) for net in (model, result))
    assert float((found - exact).norm() / exact.norm()) < 0.5


@pytest.mark.parametrize("has_graph", [True, False])
def test_a_norm_that_runs_twice_is_left_and_named(has_graph: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer, self.last = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x if has_graph or bool((x == x).all()) else -x)
            return self.norm(self.last(self.norm(self.layer(x))))

    model = randomized(Twice())
    result = bgd.quantize(model, vectors(), em(batchnorm="matched"), progress=False)
    assert torch.equal(result.model.get_submodule("norm").running_mean, model.norm.running_mean)  # type: ignore[arg-type]
    assert any("called at several places: norm" in note for note in result.report.notes)


@pytest.mark.parametrize("mode", ["matched", "reestimate"])
def test_norms_that_quantization_does_not_reach_stay(mode: Any) -> None:
    """Also where other norms of the network are corrected, and where there is no graph."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.before = nn.Linear(12, 16), nn.BatchNorm1d(16)
            self.layer, self.after = nn.Linear(16, 32), nn.BatchNorm1d(32)
            self.beside = nn.BatchNorm1d(12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.after(self.layer(torch.tanh(self.before(self.stem(x)))))
            return y + self.beside(x).mean(1, keepdim=True)

    class NoGraph(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool((x == x).all()) else -x)

    for kind in (Two, NoGraph):
        model = randomized(kind())
        result = bgd.quantize(model, vectors(), em(batchnorm=mode), progress=False)
        for name, stays in (("before", True), ("after", False), ("beside", True)):
            mine, theirs = (net.get_submodule(name).running_mean for net in (result.model, model))
            assert torch.equal(mine, theirs) == stays, name
        assert any(f"batch norm ({mode}): 1 corrected" in note for note in result.report.notes)


@pytest.mark.parametrize("build", [SmallResNet, _NoGraph])
def test_a_few_million_values_are_compared(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no more than one, so that the first batch is all that is looked at, however many there are."""
    counts: list[int] = []

    def counted(pairs: Any) -> float:
        counts.append(len(list(pairs)))
        return 0.1

    monkeypatch.setattr(gain, "_ALL_VALUES", 1)
    monkeypatch.setattr(batchnorm, "output_distance", counted)
    _quantized(randomized(build()), images(6), "matched")
    assert counts and set(counts) == {1}


def test_channels_that_are_constant_in_both_networks_keep_their_variance() -> None:
    norm: Any = nn.BatchNorm1d(3).eval()
    norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    mean, nothing = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found_mean, variance = batchnorm._matched(norm, norm, (mean + 1, nothing), (mean, nothing))
    torch.testing.assert_close(variance, norm.running_var.double())
    torch.testing.assert_close(found_mean, norm.running_mean.double() + 1)


def test_statistics_that_the_norms_type_cannot_hold_are_an_error_that_names_it() -> None:
    norm: Any = nn.BatchNorm1d(2).half()
    with pytest.raises(CalibrationError, match=r"batch norm 'body\.norm'"):
        batchnorm._set_(norm, [torch.full((2,), 1e6, dtype=torch.float64), torch.ones(2)], "body.norm")


@pytest.mark.parametrize("affine", [True, False])
def test_what_is_judged_is_the_norms_own_output(affine: bool) -> None:
    norm: Any = nn.BatchNorm2d(3, eps=0.3, affine=affine).eval()
    norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([0.1, 1.0, 4.0]))
    if affine:
        norm.weight.data.copy_(torch.tensor([2.0, -1.0, 0.5]))
        norm.bias.data.copy_(torch.tensor([1.0, 0.0, -2.0]))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(batchnorm._normalized(norm, x), norm(x))
    torch.testing.assert_close(batchnorm._normalized(norm, x.half()), norm(x.half().float()))
