"""What there is to choose from, what it costs, and what is worth choosing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.planning.candidates import (
    block_sizes,
    codebook_sizes,
    fitted_sizes,
    options_of,
    rated,
    weight_sensitivity,
    worthwhile,
)
from bgd_plugin.planning.losses import LEVEL, Sensitivity, beside_codes, joint_loss
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.rate import RateCurve, largest_codebook


def _planned(shape: tuple[int, ...], **fields: Any) -> PlannedLayer:
    common = {"name": "a", "target": "a", "kind": "linear", "family": "linear", "calls": ("a",), "note": "clamped"}
    return PlannedLayer(**(common | {"weight_shape": shape, "block_size": 4, "codebook_size": 256} | fields))


def test_all_sizes_of_a_layer_are_options_and_so_is_float() -> None:
    options = options_of(_planned((64, 64), codebook_storage="int8", mask_bytes=7), float_bytes=8192)
    sizes = {(o.layer.block_size, o.layer.codebook_size) if o.layer else None for o in options}
    assert sizes == {(d, k) for d in block_sizes((64, 64)) for k in codebook_sizes((64, 64), d)} | {None}
    assert [o.size_bytes for o in options] == sorted(o.size_bytes for o in options)
    for option in options:
        layer = option.layer
        if layer is None:
            assert option.size_bytes == 8192
        else:
            bits = 64 * (64 // layer.block_size) * layer.codebook_size.bit_length() - 64 * (64 // layer.block_size)
            assert option.size_bytes == -(-bits // 8) + layer.codebook_size * layer.block_size + 4 + 7
            assert layer.note == ""


def test_trellis_codes_are_an_option_where_the_settings_allow_them_and_rows_suffice() -> None:
    def forms(rows: int, **asked: Any) -> list[PlannedLayer]:
        found = options_of(_planned((rows, 64), mask_bytes=7), float_bytes=8192, **asked)
        return [o.layer for o in found if o.layer is not None and o.layer.codes == "trellis"]

    (layer,) = forms(64, codes="trellis")
    assert layer.compressed_bytes == 64 * 16 + 2 * 64 + 7
    assert (layer.form, layer.codebook_storage, layer.note) == ("trellis", "float16", "")
    assert not forms(64) and not forms(64, codes="entropy") and not forms(15, codes="trellis")
    assert not forms(64, codes="trellis", codebook_size=16)  # of the user's


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_data_trellis_codes_lose_less_than_blocks_at_two_bits(device: str) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).to(device)
    known = weight_sensitivity(weight, torch.Generator().manual_seed(0), "trellis")
    assert 0.6 < known.windows / known.error(4, 256) < 0.8
    kept = rated(worthwhile(options_of(_planned((256, 128)), float_bytes=65536, codes="trellis"), known), known)
    assert sum(o.layer is not None and o.layer.codes == "trellis" for o in kept) == 1
    blocks = weight_sensitivity(weight, torch.Generator().manual_seed(0))
    assert device == "meta" or math.isinf(blocks.windows)


def test_an_option_of_unknown_loss_is_not_chosen() -> None:
    curves = tuple(RateCurve(block_size=d, points=((16, 1.0),)) for d in block_sizes((256, 64)))
    known = Sensitivity(curves=curves, losses=((1.0, 3.0),), reason="made up")
    options = options_of(_planned((256, 64)), float_bytes=32768, codes="trellis")
    assert all(math.isfinite(o.loss) for o in rated(worthwhile(options, known), known))
    assert all(o.layer is None or o.layer.codes == "blocks" for o in rated(worthwhile(options, known), known))


def test_only_options_that_lose_less_than_all_smaller_ones_are_kept() -> None:
    curves = tuple(RateCurve(block_size=d, points=((16, 1.0 / d), (256, 0.1 / d))) for d in block_sizes((64, 64)))
    sensitivity = Sensitivity(curves=curves, losses=((1.0, 3.0),), reason="made up")
    options = options_of(_planned((64, 64)), float_bytes=3000)
    kept = rated(worthwhile(options, sensitivity), sensitivity)
    losses = {o.size_bytes: o.loss for o in kept}
    assert [o.size_bytes for o in kept] == sorted(losses) and list(losses.values()) == sorted(losses.values())[::-1]
    assert len(set(losses.values())) == len(kept) > 3
    for option in options:  # nothing is left out that is worth its bytes
        loss = sensitivity.loss(option.layer.block_size, option.layer.codebook_size) if option.layer else 0.0
        assert any(o.size_bytes <= option.size_bytes and o.loss <= loss for o in kept)
    assert kept[-1].layer is None and kept[-1].loss == 0.0  # beyond float nothing is worth anything
    assert kept[0].loss == pytest.approx(3.0 / 8)  # 16 codewords of 8 weights are the smallest of all


_FLAT = (RateCurve(block_size=4, points=((16, 0.5), (256, 0.1))),)


def test_what_an_error_costs_is_told_at_the_loss_of_all_layers_together() -> None:
    """A network that is sure of its answers: twice the error brings ten times the loss, at last no more than twice."""
    one = Sensitivity(curves=_FLAT, losses=((0.1, 0.001), (0.2, 0.01), (0.4, 0.1), (0.8, 0.2)), reason="r")
    between = [(0.05, 0.0005), (1.6, 0.4), (0.1 * 2**0.5, 0.001 * 10**0.5)]
    for error, loss in (*one.losses, *between):
        assert one.error_at(loss) == pytest.approx(error)
        assert one.per_error(loss) == pytest.approx(loss / error)
    assert one.loss(4, 16, 0.1) == pytest.approx(0.5 * 0.1 / 0.4)
    assert one.loss(4, 16) == one.loss(4, 16, LEVEL)


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=5))
def test_the_joint_loss_is_that_at_which_the_shares_add_up_to_it(errors: list[float]) -> None:
    powers = [Sensitivity(curves=_FLAT, losses=((0.1, 0.001), (0.2, 0.01 / i)), reason="r") for i in range(1, 6)]
    loss = joint_loss(list(zip(powers, errors, strict=False)))
    shares = sum(one.per_error(loss) * error for one, error in zip(powers, errors, strict=False))
    assert shares == pytest.approx(loss, rel=0.01)


def test_losses_that_are_proportional_to_errors_add_up() -> None:
    flat = [Sensitivity(curves=_FLAT, losses=((1.0, per_error),), reason="r") for per_error in (0.1, 2.0)]
    assert joint_loss([(flat[0], 3.0), (flat[1], 0.5)]) == pytest.approx(0.3 + 1.0, rel=0.002)
    assert joint_loss([(flat[0], 0.0)]) == joint_loss([]) == 0.0


def test_a_sensitivity_is_the_same_after_json() -> None:
    one = Sensitivity(
        curves=(RateCurve(block_size=4, points=((16, 0.5), (256, 0.1))),), losses=((1.0, 2.0),), reason="r"
    )
    other = Sensitivity.from_dict(json.loads(json.dumps(one.to_dict())))
    assert other == one
    assert other.loss(4, 64) == pytest.approx(2.0 * (0.5 * 0.1) ** 0.5)


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((64, 64), 4, (16, 128)),  # few blocks: the largest as well
        ((512, 512), 4, (16, 256)),  # very many blocks: not the largest
        ((256, 256), 4, (16, 256, 2048)),
        ((8, 16), 4, (4,)),
        ((64, 64), 1, (16, 256)),
        ((512, 512), 8, (16, 256)),
        ((256, 256), 8, (16, 256, 1024)),
        ((16, 32), 8, (8,)),
        ((16, 64), 8, (16,)),
    ],
)
def test_quick_fits_are_done_where_they_are_worth_their_time(
    shape: tuple[int, ...], block: int, expected: tuple[int, ...]
) -> None:
    assert fitted_sizes(shape, block) == expected


def test_no_codebook_takes_more_than_eight_bits_for_a_weight() -> None:
    assert codebook_sizes((512, 512), 1)[-1] == 256
    assert codebook_sizes((512, 512), 2)[-1] == 4096


def test_without_data_the_loss_is_the_weights_relative_error() -> None:
    """The error of the nearest of 64 codewords, whatever the weight's scale."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    losses = [
        weight_sensitivity(factor * weight, torch.Generator().manual_seed(0)).loss(4, 16) for factor in (1.0, 100.0)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    blocks = to_blocks(weight, 4).flatten(0, 1)
    codebook = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:16]]
    for _ in range(20):
        codes = torch.cdist(blocks, codebook).argmin(1)
        codebook = torch.stack([blocks[codes == k].mean(0) for k in range(16)])
    literal = float((blocks - codebook[codes]).square().sum() / blocks.square().sum())
    assert losses[0] == pytest.approx(literal, rel=0.05)
    assert "own error" in weight_sensitivity(weight, torch.Generator()).reason
    assert weight_sensitivity(torch.zeros(64, 64), torch.Generator()).loss(4, 16) == 0.0


def test_on_the_meta_device_the_law_alone_rates_sizes() -> None:
    found = weight_sensitivity(torch.empty(64, 64, device="meta"), torch.Generator())
    assert found.loss(4, 16) == pytest.approx(16 ** (-2 / 4))
    assert found.loss(2, 16) == pytest.approx(1 / 16)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64, 1, 1), (1, 2, 4, 8, 16)),
        ((64, 30), (1, 2)),
        ((64, 64, 3, 3), (1, 2, 3, 9, 18, 36)),
        ((64, 3, 3, 3), (1, 3, 9)),
        ((64, 64, 5, 5), (1, 2, 5, 25, 50)),
        ((64, 35), (1, 5, 7, 35)),
        ((64, 67), (1,)),
    ],
)
def test_block_sizes_divide_a_row(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert block_sizes(shape) == expected


def test_codebook_sizes_stay_below_a_quarter_of_the_blocks() -> None:
    assert codebook_sizes((64, 64), 4) == (16, 32, 64, 128)
    assert codebook_sizes((8, 16), 4) == (4,)
    assert codebook_sizes((2, 8), 4) == ()
    assert codebook_sizes((64, 64), 1)[-1] == 256


def test_streams_have_rates_and_what_is_beside_the_codes() -> None:
    planned = _planned((64, 64), codebook_storage="int8", codes="blocks")
    options = options_of(planned, float_bytes=8192, codes="entropy")
    streams = [o for o in options if o.layer is not None and o.layer.codes == "entropy"]
    rates = [bits / 16 for bits in (*range(12, 48), *range(48, 97, 4))]
    beside = beside_codes(_planned((64, 64)))
    assert [o.size_bytes for o in streams] == [beside + math.ceil(rate * 64 * 64 / 8) for rate in rates]
    for option in streams:
        layer = option.layer
        assert layer is not None and (layer.block_size, layer.codebook_size, layer.note) == (1, 256, "")
        assert layer.size_bytes == layer.compressed_bytes == option.size_bytes
    assert len(options_of(planned, 8192)) == len(options) - len(streams)
    assert not any(o.layer and o.layer.codes == "entropy" for o in options_of(planned, 8192, 16, codes="entropy"))


def test_a_codebook_size_of_the_users_is_kept_to_in_all_blocks() -> None:
    options = options_of(_planned((64, 64)), 8192, 64)
    assert all(o.layer is not None for o in options)
    assert {(o.layer.block_size, o.layer.codebook_size) for o in options if o.layer} == {
        (d, min(64, largest_codebook(64 * 64 // d))) for d in block_sizes((64, 64))
    }
