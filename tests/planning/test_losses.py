"""The law that turns errors into losses: between, below and beyond the points that were measured, and together."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from bgd_plugin.encoding.stream import overhead_bytes
from bgd_plugin.planning.losses import LEVEL, Sensitivity, beside_codes, entropy_bits, joint_loss
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.rate import EntropyCurve, RateCurve

_LAYER = PlannedLayer(
    **dict.fromkeys(("name", "target", "kind", "family"), "a"),
    weight_shape=(40, 100),
    block_size=4,
    codebook_size=16,
    calls=(),
)


def _known(*losses: tuple[float, float], **fields: Any) -> Sensitivity:
    curves = (RateCurve(block_size=2, points=((16, 0.5),)), RateCurve(block_size=4, points=((16, 0.8), (256, 0.2))))
    return Sensitivity(curves=curves, losses=losses or ((1.0, 1.0),), reason="made up", **fields)


def test_the_error_is_that_of_the_block_size_and_rounding_comes_on_top() -> None:
    assert _known().error(4, 256) == pytest.approx(0.2)
    assert _known(rounding=0.1).error(4, 16) == pytest.approx(0.9)
    assert _known(rounding=0.1).error(2, 16) == pytest.approx(0.6)


def test_between_points_the_loss_is_a_power_of_the_error() -> None:
    one = _known((1.0, 0.01), (4.0, 0.16), (16.0, 0.16 * 16**1.5))
    assert one.error_at(0.01) == pytest.approx(1.0) and one.error_at(0.16) == pytest.approx(4.0)
    assert one.error_at(0.04) == pytest.approx(2.0)  # the square, up to the second point
    assert one.error_at(0.16 * 4**1.5 * 2) == pytest.approx(4 * (4**1.5 * 2) ** (1 / (math.log(16**1.5) / math.log(4))))


def test_below_the_first_point_the_loss_is_proportional_and_beyond_the_last_the_power_goes_on() -> None:
    one = _known((1.0, 0.01), (4.0, 0.16))
    assert one.error_at(0.0025) == pytest.approx(0.25)
    assert one.error_at(0.64) == pytest.approx(8.0)
    assert _known((2.0, 0.1)).error_at(0.3) == pytest.approx(6.0)


def test_a_loss_that_hardly_grows_counts_as_one_that_grows_a_little() -> None:
    flat = _known((1.0, 0.01), (100.0, 0.0101))
    assert flat.error_at(0.0101) == pytest.approx(1.01**5)


def test_shares_are_told_at_the_loss_of_all() -> None:
    one = _known((1.0, 0.01), (4.0, 0.16))
    assert one.per_error(0.16) == pytest.approx(0.04) and one.per_error() == pytest.approx(LEVEL / one.error_at(LEVEL))
    assert one.loss(4, 16, 0.16) == pytest.approx(0.04 * 0.8)
    assert one.loss(4, 16) == pytest.approx(one.per_error() * 0.8)


def test_a_least_loss_for_each_unit_of_error() -> None:
    one = _known((1.0, 0.01), (4.0, 0.16)).at_least(0.02)
    assert one.losses == ((1.0, 0.02), (4.0, 0.16)) and one.reason == "made up"


def test_an_entropy_coded_layer_has_the_error_of_its_rate() -> None:
    curve = EntropyCurve(points=((1.0, 0.4), (2.0, 0.1), (3.0, 0.025)))
    beside = beside_codes(_LAYER)
    assert beside == overhead_bytes(40, 100, 48) + 48 + 4
    coded = dataclasses.replace(_LAYER, codes="entropy", block_size=1, size_bytes=beside + 2 * 4000 // 8)
    assert entropy_bits(coded) == pytest.approx(2.0)
    assert entropy_bits(dataclasses.replace(coded, size_bytes=3)) == 0.0
    assert _known(entropy=curve).error_of(coded) == pytest.approx(curve.error(2.0))
    assert _known(entropy=curve).error_of(_LAYER) == pytest.approx(0.8)


def test_a_layer_with_trellis_codes_has_their_error() -> None:
    known = _known(windows=0.07)
    assert known.error_of(dataclasses.replace(_LAYER, codes="trellis", block_size=1, codebook_size=4096)) == 0.07
    assert known.error_of(_LAYER) == pytest.approx(0.8)
    assert Sensitivity.from_dict(json.loads(json.dumps(known.to_dict()))) == known


def test_the_loss_of_several_layers_is_exact_to_a_thousandth() -> None:
    one, other = _known((1.0, 0.02)), _known((2.0, 0.02))
    assert joint_loss([(one, 3.0), (other, 4.0)]) == pytest.approx(0.06 + 0.04, rel=2e-3)
    assert joint_loss([(one, 1e-9)]) == pytest.approx(2e-11, rel=2e-3)
    assert joint_loss([(one, 1e6)]) == pytest.approx(2e4, rel=2e-3)
    assert joint_loss([(one, 0.0), (other, 0.0)]) == 0.0 == joint_loss([])


def test_errors_that_grow_by_a_power_cost_more_together_than_each_alone() -> None:
    one = _known((1.0, 0.01), (4.0, 0.16))
    assert joint_loss([(one, 2.0), (one, 2.0)]) == pytest.approx(0.16, rel=2e-3)
