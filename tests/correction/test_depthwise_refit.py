"""A depthwise convolution that stays float: its new weight is the literal ridge solution, channel by channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.correction import depthwise_refit
from bgd_plugin.errors import CalibrationError
from bgd_plugin.pq.blocks import Geometry
from tests.networks import images, randomized

_CONFIG: dict[str, Any] = {
    "pointwise_conv": LayerConfig(block_size=4, codebook_size=4),
    "codebook_storage": "float16",
    "weight_storage": "float32",
    "float_storage": "float32",
    "kept_aside": 0.0,
}


def _network() -> nn.Module:
    return randomized(
        nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 1), nn.Tanh(), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16)
        )
    )


@torch.no_grad()
def _rows(network: nn.Module, data: list[Tensor]) -> Tensor:
    """The windows that the depthwise convolution at "3" sees: `[channels, positions, 9]`."""
    seen: list[Tensor] = []
    hook = network.get_submodule("3").register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for batch in data:
        network(batch)
    hook.remove()
    windows = functional.unfold(torch.cat(seen).double(), 3)
    return windows.reshape(len(windows), 16, 9, -1).permute(1, 0, 3, 2).flatten(1, 2)


def _literal(weight: Tensor, x: Tensor, theirs: Tensor) -> Tensor:
    """Weight + (H + 0.01 · mean diag H · I)⁻¹ xcᵀ (yc − xc w) for each channel's nine weights."""
    found = []
    for w, mine, reference in zip(weight.double().flatten(1), x, theirs, strict=True):
        y = reference @ w
        mine, y = mine - mine.mean(0), y - y.mean()
        h = mine.T @ mine / len(mine)
        ridge = h + 0.01 * h.diag().mean() * torch.eye(9, dtype=h.dtype)
        found.append(w + torch.linalg.solve(ridge, mine.T @ (y - mine @ w) / len(mine)))
    return torch.stack(found).reshape(weight.shape)


def test_the_new_weight_is_the_ridge_solution_on_the_quantized_networks_inputs() -> None:
    model, data = _network(), images(4, size=8, batch=8, channels=4)
    result = bgd.quantize(model, data, BGDConfig(**_CONFIG, max_divergence=None), progress=False).model
    weight: Any = model.get_submodule("3").weight.detach()
    expected = _literal(weight, _rows(result, data), _rows(model, data))
    found: Any = result.get_submodule("3").weight.detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert float((found - weight).norm() / weight.norm()) > 0.02


@pytest.mark.parametrize("fields", [{"refit_depthwise": False}, {"method": "em"}])
def test_it_stays_where_the_settings_do_not_want_it(fields: dict[str, Any]) -> None:
    model, data = _network(), images(4, size=8, batch=8, channels=4)
    result = bgd.quantize(model, data, BGDConfig(**(_CONFIG | fields), max_divergence=None), progress=False)
    assert torch.equal(result.model.get_submodule("3").weight, model.get_submodule("3").weight)
    assert not any("depthwise" in note for note in result.report.notes)


def test_it_stays_where_its_inputs_are_the_float_networks() -> None:
    """Nothing before it is quantized, so there is nothing to make good."""
    model = randomized(nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1)))
    result = bgd.quantize(model, images(2, channels=4), BGDConfig(**_CONFIG, max_divergence=None), progress=False)
    assert torch.equal(result.model.get_submodule("1").weight, model.get_submodule("1").weight)
    assert not any("depthwise" in note for note in result.report.notes)


def test_what_follows_sees_the_new_weight_rounded_as_it_will_be_stored() -> None:
    """The batch norm behind it is corrected to the outputs of the rounded weight, not to those of any other."""
    model, data = _network(), images(4, size=8, batch=8, channels=4)
    result = bgd.quantize(
        model, data, BGDConfig(**(_CONFIG | {"weight_storage": "int8"}), max_divergence=None), progress=False
    ).model
    layer: Any = result.get_submodule("3")
    rows = layer.weight.detach().flatten(1)
    grid = rows / (rows.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=2e-2)
    means = []
    for network in (result, model):
        seen: list[Tensor] = []
        network.get_submodule("4").register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.detach()))
        for batch in data:
            network(batch)
        means.append(torch.cat(seen).double().mean((0, 2, 3)))
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


class _Enough(Exception):
    """What was wanted has been seen."""


@pytest.mark.parametrize(
    ("channels", "size", "rows"), [(16, 3, 2304), (16, 7, 8192), (4000, 3, 833), (250_000, 3, 144)]
)
def test_rows_are_sampled_within_a_number_of_elements(
    monkeypatch: pytest.MonkeyPatch, channels: int, size: int, rows: int
) -> None:
    """256 for each weight of a channel, 8,192, or 30 million numbers in all channels; but 16 for each weight."""

    def asked(inputs: Any, count: int, *_: Any, **__: Any) -> Any:
        assert count == rows
        raise _Enough

    monkeypatch.setattr(depthwise_refit, "paired_pieces", asked)
    with pytest.raises(_Enough):
        depthwise_refit.refitted(torch.zeros(channels, 1, size, size), CollectedInputs("a", [], []), torch.Generator())


def test_a_quarter_of_the_rows_shows_the_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 rows of ten pieces: three pieces of forty rows; the judges are the last two pieces."""
    seen: list[int] = []

    def counted(pairs: Any) -> float:
        seen.append(sum(len(mine) for mine, _ in pairs))
        return 0.1

    monkeypatch.setattr(depthwise_refit, "output_distance", counted)
    monkeypatch.setattr(depthwise_refit, "_MAX_ROWS", 400)
    calls = [[(torch.randn(10, 4, 10), Geometry.of((3,), 1, 1, 1, 4))] for _ in range(10)]
    depthwise_refit.refitted(torch.randn(4, 1, 3), CollectedInputs("a", calls, calls), torch.Generator().manual_seed(0))
    assert seen == [120, 80, 80, 120]


def _inputs_of(student: Tensor, reference: Tensor) -> CollectedInputs:
    geometry = Geometry.of((3,), 1, 1, 1, 4)
    return CollectedInputs("body.0", *([[(x, geometry)] for x in values.split(8)] for values in (student, reference)))


def test_means_are_left_to_what_follows() -> None:
    """Inputs that are off by a constant lose nothing that a refit could gain, but for the zeros of the padding."""
    x, weight = torch.randn(40, 4, 64), torch.randn(4, 1, 3)
    gain = depthwise_refit.refitted(weight, _inputs_of(x + 0.5, x), torch.Generator().manual_seed(0)).gain
    with_means = float((0.5 * weight.sum(2)).square().mean() / functional.conv1d(x, weight, groups=4).var())
    assert gain.before < 0.1 * with_means


def test_inputs_whose_squares_overflow_name_the_layer() -> None:
    x = torch.full((40, 4, 64), 1e30)
    with pytest.raises(CalibrationError, match=r"layer 'body\.0'"):
        depthwise_refit.refitted(torch.randn(4, 1, 3), _inputs_of(x, x), torch.Generator().manual_seed(0))


def test_processes_solve_for_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the samples that are tried, and those of the others."""
    shared: list[float] = []
    share = depthwise_refit.MomentSums.share_

    def watched(self: Any) -> None:
        shared.append(float(self.count))
        share(self)

    monkeypatch.setattr(depthwise_refit.MomentSums, "share_", watched)
    x = torch.randn(40, 4, 10)
    weight = torch.randn(4, 1, 3)
    depthwise_refit.refitted(weight, _inputs_of(x + 0.1 * torch.randn_like(x), x), torch.Generator().manual_seed(0))
    assert len(shared) == 2 and shared[0] == 4 * shared[1] > 0


def test_channels_with_several_filters_each_have_their_literal_ones() -> None:
    """Of four channels with two filters each; both see the windows of their channel."""
    torch.manual_seed(0)
    theirs, weight = torch.randn(40, 4, 16), torch.randn(8, 1, 3)
    mine = theirs + 0.3 * torch.randn_like(theirs)
    found = depthwise_refit.refitted(weight, _inputs_of(mine, theirs), torch.Generator().manual_seed(0))
    windows = [functional.pad(x.double(), (1, 1)).unfold(2, 3, 1).transpose(0, 1).flatten(1, 2) for x in (mine, theirs)]
    for row in range(8):
        x, y = windows[0][row // 2], windows[1][row // 2] @ weight[row, 0].double()
        x, y = x - x.mean(0), y - y.mean()
        h = x.T @ x / len(x)
        ridge = h + 0.01 * h.diag().mean() * torch.eye(3, dtype=h.dtype)
        expected = weight[row, 0].double() + torch.linalg.solve(ridge, x.T @ (y - x @ weight[row, 0].double()) / len(x))
        torch.testing.assert_close(found.weight[row, 0].double(), expected, rtol=1e-3, atol=1e-4)
    outputs = [
        torch.conv1d(x, w, groups=4, padding=1).transpose(0, 1).flatten(1)
        for x, w in ((mine, weight), (theirs, weight))
    ]
    mean = [values - values.mean(1, keepdim=True) for values in outputs]
    assert found.gain.before == pytest.approx(
        float((mean[0] - mean[1]).square().sum() / mean[1].square().sum()), rel=0.1
    )
