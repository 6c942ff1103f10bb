"""The way to compute a layer follows from its sizes: the same in every process, and near the fastest one."""

from __future__ import annotations

import pytest

from bgd_plugin.kernels.choice import beats_convolution, cheapest


def _way(
    inputs: int, rows: int, columns: int, codewords: int, block_size: int, *, mask: bool = False, bytes_: bool = False
) -> str:
    return cheapest(inputs, rows, columns // block_size, codewords, block_size, mask, bytes_)


# Fastest of repeated runs on one thread, on a machine with AVX-512. Where two ways were within a tenth, both are right.
@pytest.mark.parametrize(
    ("layer", "fastest"),
    [
        ((576, 576, 256, 4), {1: "dot", 2: "dot", 3: "dot", 8: "lanes", 16: "lanes", 64: "lanes", 512: "lanes"}),
        ((576, 576, 1024, 4), {1: "dot", 2: "dot", 8: "lanes", 64: "lanes"}),
        ((384, 1536, 256, 8), {1: "dot", 2: "dot", 3: "dot", 8: "lanes", 16: "lanes"}),
        ((384, 1536, 1024, 4), {1: "dot", 2: "dot", 8: "lanes", 32: "lanes"}),
        ((2048, 2048, 256, 4), {1: "dot", 3: "table", 8: "table", 64: "table", 256: "table"}),
        ((2048, 2048, 64, 2), {1: "dot", 2: "table", 16: "lanes"}),
        ((3072, 768, 16, 4), {1: "dot", 3: "table", 64: "table"}),
        ((4096, 4096, 256, 8), {1: "dot", 8: "table", 64: "table", 512: "table"}),
    ],
)
def test_it_is_the_fastest_where_that_was_clear(layer: tuple[int, int, int, int], fastest: dict[int, str]) -> None:
    assert {count: _way(count, *layer) for count in fastest} == fastest


@pytest.mark.parametrize(
    ("layer", "fastest"),
    [
        ((4096, 4096, 256, 4), {1: "permuted", 2: "permuted", 8: "table"}),
        ((4096, 4096, 256, 8), {1: "permuted", 2: "permuted", 8: "table"}),
        ((49152, 576, 256, 8), {1: "permuted"}),
        ((1536, 384, 256, 4), {1: "dot"}),
        ((576, 1536, 256, 4), {1: "dot"}),
        ((1536, 576, 256, 4), {1: "dot"}),  # their tables would cost more in what they drive from the caches
    ],
)
def test_tables_in_bytes_where_there_are_many_rows(layer: tuple[int, int, int, int], fastest: dict[int, str]) -> None:
    assert {count: _way(count, *layer, bytes_=True) for count in fastest} == fastest


def test_what_a_way_cannot_do_is_not_chosen() -> None:
    assert _way(8, 2048, 2048, 256, 4, mask=True) == "tiles"  # single weights are zero: no table
    assert _way(8, 2048, 2048, 16, 64) == "tiles"  # blocks too long for one
    assert _way(1, 2048, 2048, 256, 4, mask=True) == "dot"
    assert _way(1, 4096, 4096, 256, 4, mask=True, bytes_=True) == "dot"
    assert _way(1, 4096, 4096, 256, 4) == "dot"


def test_more_inputs_never_bring_back_the_way_for_fewer() -> None:
    order = ["dot", "table", "lanes"]
    for columns in (64, 576, 4096):
        places = [order.index(_way(count, columns, columns, 256, 4)) for count in range(1, 65)]
        assert [place for place in places if place == 0] == places[: places.count(0)]


# Fastest of repeated runs of the layers of EfficientNet-Lite0, as above.
@pytest.mark.parametrize(
    ("positions", "rows", "columns", "expected"),
    [
        (112 * 112, 96, 16, False),  # little work for each number: torch's convolution writes its outputs faster
        (56 * 56, 144, 24, False),
        (56 * 56, 24, 96, True),
        (14 * 14, 672, 112, True),
        (49, 192, 1152, True),
    ],
)
def test_pointwise_convolutions_are_linear_where_that_is_faster(
    positions: int, rows: int, columns: int, expected: bool
) -> None:
    assert beats_convolution(positions, rows, columns // 4, 256, 4) == expected
