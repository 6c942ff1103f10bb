"""What a step says it gained is what a literal computation on the finished networks finds."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.correction import gain as gain_module
from bgd_plugin.correction.gain import Gain, judged_pairs, output_distance, some_samples
from tests.networks import SmallResNet, images, randomized, vectors

GAIN = re.compile(r"median output error ([\d.]+)% → ([\d.]+)% of the variance")
SHIFT = re.compile(r"(\d+) corrected; median output error down by ([\d.]+)% of the variance")


def _note(report: bgd.results.Report, beginning: str) -> str:
    return next(note for note in report.notes if beginning in note)


def _gain(report: bgd.results.Report, beginning: str) -> Gain:
    found = GAIN.search(_note(report, beginning))
    assert found is not None
    return Gain(before=float(found[1]) / 100, after=float(found[2]) / 100)


def _outputs(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch) for batch in data]


def _distance(model: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    """The literal definition, all data at once, channels last."""
    mine, theirs = (torch.cat(_outputs(net, data)).double().movedim(1, -1).flatten(0, -2) for net in (model, other))
    return float((mine - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())


def test_output_distance_is_the_literal_one() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    rows_a, rows_b = (x.movedim(1, -1).flatten(0, -2) for x in (a, b))
    literal = (rows_a - rows_b).square().sum() / (rows_b - rows_b.mean(0)).square().sum()
    assert output_distance([(a, b)]) == pytest.approx(float(literal), rel=1e-5)


def test_a_distance_is_exact_around_a_large_mean() -> None:
    """Where sums in single precision would lose a percent of the variance."""
    theirs = [300 + torch.randn(4000, 2) for _ in range(8)]
    pairs = [(values + 0.125, values) for values in theirs]
    b = torch.cat(theirs).double()
    exact = len(b) * 2 * 0.125**2 / float((b - b.mean(0)).square().sum())
    assert output_distance(pairs) == pytest.approx(exact, rel=1e-3)


def test_of_several_gains_the_medians_are_told() -> None:
    gains = [Gain(before=b, after=a) for b, a in ((0.9, 0.5), (0.2, 0.1), (0.4, 0.01))]
    assert "median" in Gain.said(gains) and "40.00% → 10.00% of the variance" in Gain.said(gains)
    unknown = [*gains, Gain(before=math.nan, after=math.nan)]
    assert "%" not in Gain.said(unknown)


def test_outputs_that_do_not_vary_have_no_distance() -> None:
    assert output_distance([(torch.zeros(4, 2), torch.full((4, 2), 3.0))]) == 0.0
    assert output_distance([]) == 0.0
    rounding = 1e3 + 1e-4 * torch.randn(400, 2)
    assert output_distance([(torch.zeros(400, 2), rounding)]) == 0.0


def test_outputs_are_compared_until_there_are_values_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten values: three pairs of four; of each batch as many samples as hold seven values, and one at least."""
    pairs = [(torch.randn(2, 2), torch.randn(2, 2)) for _ in range(5)]
    monkeypatch.setattr(gain_module, "_ALL_VALUES", 10)
    assert len(list(judged_pairs(pairs))) == 3
    assert len(list(judged_pairs(pairs[:2]))) == 2
    monkeypatch.setattr(gain_module, "_VALUES", 7)
    assert [len(some_samples(torch.zeros(9, *shape))) for shape in ((), (3,), (4, 5))] == [7, 2, 1]


def test_a_quarter_of_a_million_values_of_a_batch_are_compared_and_one_in_all() -> None:
    """Expanded tensors, which take no memory."""
    value = torch.zeros(1, 1)
    assert len(some_samples(value.expand(5, 2**17))) == 2
    assert len(some_samples(value.expand(5, 2**17 + 1))) == 1
    assert len(some_samples(torch.zeros(0, 3))) == 0 and len(some_samples(torch.zeros(4, 0))) == 4
    pairs = [(value.expand(2**10, 2**9),) * 2] * 9
    assert len(list(judged_pairs(pairs))) == 2


def test_a_distance_is_over_the_outputs_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two with the same outputs it is that of one."""
    torch.manual_seed(0)
    pairs = [(torch.randn(7, 3), torch.randn(7, 3) + 2) for _ in range(2)]
    alone = output_distance(pairs)
    monkeypatch.setattr(gain_module, "total", lambda number: 2 * float(number))
    assert output_distance(pairs) == pytest.approx(alone)


@pytest.mark.parametrize(("method", "mode"), [("em", "matched"), ("full", "matched"), ("full", "reestimate")])
def test_batch_norm_says_what_its_correction_gained(mode: Any, method: Any) -> None:
    """Before: the network whose norms are kept; after: the corrected one. The norm is the last layer."""
    model = randomized(nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)))
    data = vectors(3, batch=64)
    settings: dict[str, Any] = {"method": method, "overrides": (("0", None),), "weight_storage": "float32"}
    kept, corrected = (
        bgd.quantize(
            model, data, bgd.BGDConfig(batchnorm=b, kept_aside=0.0, **settings, max_divergence=None), progress=False
        )
        for b in ("keep", mode)
    )
    gain = _gain(corrected.report, f"batch norm ({mode}): 1 corrected")
    assert gain.after == pytest.approx(_distance(corrected.model, model, data), rel=1e-3, abs=2e-4)
    assert gain.before == pytest.approx(_distance(kept.model, model, data), rel=1e-3, abs=2e-4)


def test_without_a_float_network_beside_it_nothing_is_compared() -> None:
    config = bgd.BGDConfig(method="em", batchnorm="reestimate", max_divergence=None)
    report = bgd.quantize(randomized(SmallResNet()), images(3), config, progress=False).report
    assert "3 corrected, not measured" in _note(report, "batch norm (reestimate)")


def test_a_network_that_is_not_a_graph_says_the_same() -> None:
    """But for the first layer, which is rounded before the walk over a graph comes to it, and after all else here."""

    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool(x.sum() == x.sum()) else -x)

    layers = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)]
    whole, data = randomized(nn.Sequential(*layers)), vectors(3, batch=64)
    branching = Branching(*whole).eval()
    config = bgd.BGDConfig(method="em", kept_aside=0.0, max_divergence=None)
    one, other = (bgd.quantize(net, data, config, progress=False).report for net in (whole, branching))
    gains = [_gain(report, "batch norm") for report in (one, other)]
    assert gains[0].before == pytest.approx(gains[1].before, rel=0.02) and gains[0].before > gains[0].after
    assert gains[0].after == pytest.approx(gains[1].after, rel=0.02)


def test_shifted_biases_say_what_they_took_off_the_error() -> None:
    model, data = randomized(nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 40))), vectors(3, batch=64)
    config = bgd.BGDConfig(
        overrides=(("0", None),), weight_storage="float32", asymmetric_step=0, kept_aside=0.0, max_divergence=None
    )
    result = bgd.quantize(model, data, config, progress=False)
    found = SHIFT.search(_note(result.report, "bias (matched)"))
    assert found is not None and found[1] == "1"
    unshifted = bgd.quantize(model, data, config, progress=False).model
    unshifted.get_submodule("2").bias.data.copy_(model[2].bias)  # type: ignore[union-attr]
    taken = _distance(unshifted, model, data) - _distance(result.model, model, data)
    assert taken > 0
    assert float(found[2]) / 100 == pytest.approx(taken, rel=0.1)


def test_depthwise_convolutions_say_what_fitting_them_anew_gained() -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32))
    )
    report = bgd.quantize(model, images(3, batch=16), bgd.BGDConfig(max_divergence=None), progress=False).report
    gain = _gain(report, "1 depthwise convolutions")
    assert 0 < gain.after < gain.before


def test_the_small_residual_network_says_all_it_gained() -> None:
    report = bgd.quantize(
        randomized(SmallResNet()), images(4, batch=16), bgd.BGDConfig(max_divergence=None), progress=False
    ).report
    gain = _gain(report, "batch norm (matched): 3 corrected")
    assert gain.before > 0 and gain.after > 0
