"""Moments from a convolution's inputs are those of its unfolded inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.blocks import Geometry, unfold_inputs
from bgd_plugin.pq.gram import MomentSums
from bgd_plugin.pq.maps import Maps

ALL = 1 << 30
CASES = {
    "square": ((7, 7), (3, 3), 1),
    "oblong": ((5, 9), (3, 2), (1, 0)),
    "even": ((6, 6), (2, 2), 0),
    "same": ((6, 6), (2, 4), "same"),
    "a line": ((20,), (5,), 2),
    "a volume": ((3, 4, 5), (3, 2, 3), (1, 0, 1)),
    "smaller than the kernel": ((2, 2), (3, 3), 1),
    "one position": ((3, 3), (3, 3), 0),
    "one wide position": ((1, 9), (1, 7), 0),
    "one position of a line": ((5,), (5,), 0),
}


def _maps(x: Tensor, geometry: Geometry) -> Maps:
    """Whether or not they are less work."""
    found = Maps.of(x, geometry, ALL)
    if found is not None:
        return found
    assert geometry.padding_mode == "zeros"
    pads = [amount for pair in reversed(geometry.padding) for amount in pair]
    values = torch.nn.functional.pad(x, pads).movedim(1, -1).contiguous()
    return Maps(values=values, kernel_size=geometry.kernel_size)


def _drawn(
    sizes: Sequence[int], kernel: Sequence[int], padding: int | str | Sequence[int], samples: int = 30
) -> tuple[Tensor, Geometry, Tensor]:
    """Inputs with a large mean, the geometry, and outputs at its positions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, *sizes, generator=generator) + torch.tensor([5.0, -9, 0, 1]).view(4, *[1] * len(sizes))
    geometry = Geometry.of(kernel, 1, padding, 1, 1)
    positions = unfold_inputs(x, geometry).shape[1]
    return x, geometry, torch.randn(1, positions, 3, generator=generator) - 4


@pytest.mark.parametrize("case", CASES)
def test_gram_means_and_cross_are_those_of_the_rows(case: str) -> None:
    x, geometry, outputs = _drawn(*CASES[case])
    maps, rows = _maps(x, geometry), unfold_inputs(x, geometry)
    assert torch.equal(maps.rows(), rows)
    assert (maps.positions, maps.columns) == rows.shape[1:]
    exact = rows.double()
    torch.testing.assert_close(maps.gram().double(), exact.mT @ exact, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(maps.cross(outputs).double(), exact.mT @ outputs.double(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(maps.means().double(), exact.mean(1), rtol=1e-5, atol=1e-5)


def test_each_product_is_a_sum_over_the_positions() -> None:
    """The literal definition, one pair of columns at a time."""
    x, geometry, _ = _drawn((4, 5), (2, 3), (1, 0), samples=2)
    maps = _maps(x, geometry)
    values, gram = maps.values.double(), maps.gram()[0]
    seen = list(itertools.product(range(4), range(2), range(3)))
    positions = list(itertools.product(range(2), range(5), range(3)))
    for (i, (c, y, z)), (j, (d, v, w)) in itertools.product(enumerate(seen), repeat=2):
        wanted = sum(float(values[n, p + y, q + z, c] * values[n, p + v, q + w, d]) for n, p, q in positions)
        assert math.isclose(float(gram[i, j]), wanted, rel_tol=1e-4, abs_tol=1e-2)


@pytest.mark.parametrize("by_distances", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_the_rows(case: str, by_distances: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Maps, "is_less_work", lambda self: by_distances)
    samples = 300
    x, geometry, outputs = _drawn(*CASES[case], samples=samples)
    by_maps, by_rows = MomentSums(), MomentSums()
    by_rows.add_(unfold_inputs(x, geometry).double(), outputs.double())
    for some, theirs in zip(x.split(70), outputs.split(70 * outputs.shape[1] // samples, 1), strict=True):
        by_maps.add_maps_(_maps(some, geometry), theirs)
    assert by_maps.count == by_rows.count
    found, wanted = by_maps.means_(), by_rows.means_()
    for name in ("covariance", "mean", "cross", "output_mean"):
        mine, exact = getattr(found, name).double(), getattr(wanted, name).double()
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


def test_a_large_mean_leaves_the_digits_of_the_variance() -> None:
    x, geometry, outputs = _drawn((7, 7), (3, 3), 0, samples=100)
    x = 0.1 * x + 1000
    by_maps, by_rows = MomentSums(), MomentSums()
    by_maps.add_maps_(_maps(x, geometry), outputs)
    by_rows.add_(unfold_inputs(x, geometry).double(), outputs.double())
    found, wanted = by_maps.means_().covariance.double(), by_rows.means_().covariance
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


def test_maps_of_other_sizes_rows_and_maps_add_up() -> None:
    parts = [_drawn(sizes, (3, 3), 1, samples=80) for sizes in ((7, 7), (5, 6), (7, 7))]
    mixed, plain = MomentSums(), MomentSums()
    for index, (x, geometry, outputs) in enumerate(parts):
        plain.add_(unfold_inputs(x, geometry), outputs)
        if index == 2:
            mixed.add_(unfold_inputs(x, geometry), outputs)
        else:
            mixed.add_maps_(_maps(x, geometry), outputs)
    mine, theirs = mixed.means_(), plain.means_()
    for name in ("covariance", "mean", "cross", "output_mean"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-3, atol=1e-4)


def test_the_work_grows_with_samples_channels_and_offsets() -> None:
    def is_less(samples: int, channels: int, kernel: int) -> bool:
        return Maps(values=torch.zeros(samples, 9, 9, channels), kernel_size=(kernel, kernel)).is_less_work()

    assert is_less(300, 64, 3)
    assert not is_less(3, 64, 3)  # the sums themselves
    assert not is_less(300, 2, 3)  # a product hardly starts
    assert not is_less(300, 64, 8)  # few positions see many pairs of offsets


def test_maps_that_wait_are_copies_and_take_no_more_memory_than_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    summed = MomentSums._add_all_

    def watched(self: MomentSums, maps: Maps, outputs: Tensor) -> None:
        waiting.append(maps.values.numel() + outputs.numel())
        summed(self, maps, outputs)

    monkeypatch.setattr(MomentSums, "_add_all_", watched)
    monkeypatch.setattr("bgd_plugin.pq.gram._WAITING", 0)
    x, geometry, outputs = _drawn((7, 7), (3, 3), 1, samples=40)
    wanted = MomentSums()
    wanted.add_(unfold_inputs(x, geometry), outputs)
    monkeypatch.setattr(Maps, "is_less_work", lambda self: len(self.values) > 5)
    sums, buffer = MomentSums(), torch.empty_like(x[:1])
    for sample, theirs in zip(x.split(1), outputs.split(49, 1), strict=True):
        sums.add_maps_(_maps(buffer.copy_(sample), geometry), theirs)
    torch.testing.assert_close(sums.means_().covariance, wanted.means_().covariance, rtol=1e-3, atol=1e-3)
    most, one = 2 * 36 * (36 + 3), 9 * 9 * 4 + 49 * 3
    assert len(waiting) > 5
    assert max(waiting) < most + one


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"kernel_size": (1, 1), "padding": 0},
        {"padding": 0, "sizes": (3, 3)},
        {"kernel_size": (9, 9), "padding": 4},
    ],
    ids=["a stride", "a dilation", "groups", "a single offset", "a single position", "a large kernel"],
)
def test_other_convolutions_have_no_maps(settings: dict[str, int | tuple[int, int]]) -> None:
    sizes = settings.pop("sizes", (9, 9))
    full = {"kernel_size": (3, 3), "stride": 1, "padding": 1, "dilation": 1, "groups": 1} | settings
    assert isinstance(sizes, tuple)
    assert Maps.of(torch.randn(3, 4, *sizes), Geometry.of(**full), ALL) is None  # type: ignore[arg-type]


def test_no_more_positions_are_taken_than_asked_for() -> None:
    x, geometry, _ = _drawn((7, 7), (3, 3), 1)
    assert Maps.of(x, geometry, 30 * 49) is not None
    assert Maps.of(x, geometry, 30 * 49 - 1) is None
    assert Maps.of(x[0], geometry, ALL) is None  # no dimension of samples


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_of_every_mode_is_part_of_the_maps(mode: str) -> None:
    x, _, _ = _drawn((7, 7), (3, 3), 1)
    geometry = Geometry.of((3, 3), 1, 1, 1, 1, mode)
    maps = Maps.of(x, geometry, ALL)
    assert maps is not None
    assert torch.equal(maps.rows(), unfold_inputs(x, geometry))


def test_half_precision_is_summed_in_single_precision() -> None:
    x, geometry, _ = _drawn((7, 7), (3, 3), 1)
    maps = Maps.of(x.half(), geometry, ALL)
    assert maps is not None
    assert maps.values.dtype == torch.float32
    assert torch.equal(maps.rows(), unfold_inputs(x.half(), geometry).float())
