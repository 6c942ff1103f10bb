"""Batch-norm correction: the student's output keeps the float network's mean and variance, and nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
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


def test_reestimated_outputs_are_normalized() -> None:
    model, data = randomized(SmallResNet()), images(3, batch=8)
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
