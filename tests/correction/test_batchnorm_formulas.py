"""The formulas of batch-norm correction, literally, on a walk whose student is made by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Walk, collect_batches
from bgd_plugin.correction import absorb_row_scale_
from bgd_plugin.correction.batchnorm import correct_batchnorm_
from bgd_plugin.graph import copy_module, trace
from tests.networks import images, randomized


class _Skipped(nn.Module):
    """A branch that ends in a batch norm, beside a skip that runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.branch = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.skip(x))
        return x + self.norm(self.branch(x))


def _corrected(factors: Tensor, *, with_skip: bool, mode: Any = "matched", batches: int = 3) -> Any:
    """Float norm, the student's before and after, and what both networks have there: z, y, drift, and the gain.

    Values are `[batches, channels, positions]`. The student's norm has taken a scale of the rows in already.
    """
    model = randomized(_Skipped())
    model.norm.running_var[:2] = 1e-5  # where eps counts
    reference, student = trace(copy_module(model)).eval(), trace(copy_module(model)).eval()
    student.branch.weight.data *= factors[:, None, None, None]  # type: ignore[union-attr,operator]
    student.skip.weight.data *= 0.9  # type: ignore[union-attr,operator]
    absorb_row_scale_(student.norm, torch.tensor([1.0, 2.0, 3.0, 2.0, 0.5, 1.0]))
    own = copy.deepcopy(student.norm)
    data = images(batches)
    walk = Walk(student, collect_batches(data, model, device=torch.device("cpu"), forward=None), reference)
    for target in ("branch", "skip", "norm"):
        walk.mark_changed(target)
    for node in walk.nodes():
        if node.target == "norm":
            skip = next(n for n in walk.order if "tanh" in n.name)
            gained = correct_batchnorm_(walk, node, mode, skip if with_skip else None)
    with torch.no_grad():
        skips = [torch.stack([torch.tanh(net.skip(x)) for x in data]) for net in (student, reference)]
        z, y = (
            torch.stack([net.branch(x) for x in s]).double().transpose(1, 2).flatten(3).flatten(2)
            for net, s in zip((student, reference), skips, strict=True)
        )
    drift = (skips[1] - skips[0]).double().transpose(1, 2).flatten(3).flatten(2)
    return model.norm, own, student.norm, z, y, drift, gained


def _all(values: Tensor) -> Tensor:
    """`[batches, channels, positions]` as `[channels, positions]`."""
    return values.transpose(0, 1).flatten(1)


def _sigma(norm: Any) -> Tensor:
    return (norm.running_var.double() + norm.eps).sqrt()


def _normed(norm: Any, shift_of: Any, values: Tensor) -> Tensor:
    """What a norm makes of values, by its formula, without the shift β."""
    gamma = shift_of.weight.detach().double()
    return (values - norm.running_mean.double()[:, None]) * (gamma / _sigma(norm))[:, None]


_FACTORS = torch.tensor([1.0, 0.7, 1.5, 1e4, 1e-4, 1.0])


def test_matched_statistics_are_the_formulas_within_their_bounds() -> None:
    """σ'² = σ² v'/v, μ' = m' − (m − μ) σ'/σ; no scale moves by more than 20 times its own, or below 1/20 of it."""
    shipped, own, norm, z, y, _, gained = _corrected(_FACTORS, with_skip=False, batches=6)
    z, y, sigma = _all(z), _all(y), _sigma(shipped)
    ratio = ((z.var(1, correction=0) + 1e-3 * shipped.eps) / (y.var(1, correction=0) + 1e-3 * shipped.eps)).sqrt()
    free = sigma * ratio
    wanted = torch.minimum(torch.maximum(free, 0.05 * _sigma(own)), 20 * _sigma(own))
    assert int((wanted < free).sum()) >= 1 and int((wanted > free).sum()) >= 1 and int((wanted == free).sum()) >= 2
    expected = (wanted.square() - norm.eps).clamp(min=0)
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-3, atol=1e-8)
    mean = z.mean(1) - (y.mean(1) - shipped.running_mean.double()) * wanted / sigma
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-3, atol=1e-4)
    theirs = _normed(shipped, shipped, y)
    varies = (theirs - theirs.mean(1, keepdim=True)).square().sum()
    for found, one in ((gained.before, own), (gained.after, norm)):
        lost = (_normed(one, shipped, z) - theirs).square().sum() / varies
        assert found == pytest.approx(float(lost), rel=1e-3)


def test_reestimated_statistics_are_those_of_the_inputs() -> None:
    _, _, norm, z, _, _, _ = _corrected(_FACTORS, with_skip=True, mode="reestimate")
    torch.testing.assert_close(norm.running_var.double(), _all(z).var(1, correction=0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(norm.running_mean.double(), _all(z).mean(1), rtol=1e-3, atol=1e-6)


def test_beside_a_skip_the_nearest_affine_map_is_taken_within_the_same_bounds() -> None:
    """γ(z − μ')/σ' + β is the least squares fit to the float output plus the drift: s z + o ≈ t = y + drift · σ/γ."""
    shipped, own, norm, z, y, drift, gained = _corrected(_FACTORS, with_skip=True, batches=6)
    z, y, drift, sigma = _all(z), _all(y), _all(drift), _sigma(shipped)
    scale = shipped.weight.detach().double() / sigma
    t = y + drift * (scale / (scale.square() + 0.01 * scale.square().mean()))[:, None]
    zc, tc = z - z.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    free = sigma / ((zc * tc).sum(1) / zc.square().sum(1))
    wanted = torch.minimum(torch.maximum(free, 0.05 * _sigma(own)), 20 * _sigma(own))
    assert int((wanted < free).sum()) >= 1 and int((wanted > free).sum()) >= 1 and int((wanted == free).sum()) >= 2
    expected = (wanted.square() - norm.eps).clamp(min=0)
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-3, atol=1e-8)
    mean = z.mean(1) - (t.mean(1) - shipped.running_mean.double()) * wanted / sigma
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=2e-3, atol=2e-4)
    # What it gained is said of the norm's output with the skip added to it.
    theirs = _normed(shipped, shipped, y)
    varies = (theirs - theirs.mean(1, keepdim=True)).square().sum()
    for found, one in ((gained.before, own), (gained.after, norm)):
        lost = (_normed(one, shipped, z) - theirs - drift).square().sum() / varies
        assert found == pytest.approx(float(lost), rel=1e-3)


def _seen(network: nn.Module, path: str, data: list[Tensor], *, output: bool = False) -> Tensor:
    """Inputs or outputs of a module as `[channels, positions]`."""
    seen: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_hook(
        lambda _, args, out: seen.append((out if output else args[0]).detach().clone())
    )
    for batch in data:
        network(batch)
    hook.remove()
    return torch.cat(seen).double().transpose(0, 1).flatten(1)


def test_the_norm_that_ends_a_block_is_corrected_to_what_the_skip_has_lost_as_well() -> None:
    """Least squares from the norm's input to the float network's, plus the drift that its layer was fitted to."""
    model, data = randomized(_Skipped()), images(4, batch=8)
    small = bgd.LayerConfig(block_size=1, codebook_size=4)
    config = bgd.BGDConfig(
        first_layer=small, float_storage="float32", overrides=(("branch", small),), kept_aside=0.0, max_divergence=None
    )
    result = bgd.quantize(model, data, config, progress=False).model
    z, y = (_seen(net, "branch", data, output=True) for net in (result, model))
    drift = torch.tanh(_seen(model, "skip", data, output=True)) - torch.tanh(_seen(result, "skip", data, output=True))
    sigma = (model.norm.running_var.double() + model.norm.eps).sqrt()
    gain = model.norm.weight.detach().double() / sigma
    t = y + drift * (gain / (gain.square() + 0.01 * gain.square().mean()))[:, None]
    zc, tc = z - z.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    slope = (zc * tc).sum(1) / zc.square().sum(1)
    norm: Any = result.get_submodule("norm")
    torch.testing.assert_close(norm.running_var.double() + norm.eps, (sigma / slope).square(), rtol=1e-3, atol=1e-6)
    plain = sigma * (z.var(1, correction=0) / y.var(1, correction=0)).sqrt()  # what a norm elsewhere would have
    assert float((plain / (sigma / slope) - 1).abs().max()) > 0.02


def test_a_channel_that_runs_against_the_float_networks_is_made_as_small_as_it_may_be() -> None:
    """Its nearest scale would be negative; the norm's deviation is then the largest allowed."""
    _, own, norm, *_ = _corrected(torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), with_skip=True)
    torch.testing.assert_close(_sigma(norm)[0], 20 * _sigma(own)[0], rtol=1e-3, atol=0)
    assert bool((_sigma(norm)[1:] < 5 * _sigma(own)[1:]).all())
