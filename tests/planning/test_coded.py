"""A planned layer, and what the fit has made of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from bgd_plugin.encoding.stream import encoded
from bgd_plugin.nn import PQLinear
from bgd_plugin.planning.coded import as_coded
from bgd_plugin.planning.types import PlannedLayer
from tests.encoding.walks import random_walk

PLANNED = PlannedLayer(
    name="fc",
    target="fc",
    kind="linear",
    family="linear",
    weight_shape=(60, 80),
    block_size=1,
    codebook_size=256,
    calls=(),
    codebook_storage="int8",
    codes="entropy",
    size_bytes=9999,
)


def _layer(rows: int = 60) -> PQLinear:
    codes = torch.from_numpy(random_walk(rows=rows, columns=80, size=21, offset=0))
    return PQLinear(torch.randn(21, 1), codes, nn.Linear(80, rows))


@pytest.mark.parametrize(("storage", "codebook_bytes"), [("int8", 21 + 4), ("float16", 42)])
def test_levels_and_bytes_are_those_of_the_module(storage: str, codebook_bytes: int) -> None:
    layer = _layer()
    coded = as_coded(dataclasses.replace(PLANNED, codebook_storage=storage), layer)
    length = encoded([(layer.codes, 21)])[0].numel()
    assert coded.codebook_size == 21
    assert length + codebook_bytes <= coded.compressed_bytes <= length + codebook_bytes + 8
    assert coded.memory_bytes == 60 * 80 + 4 * 21
    assert coded.code_bits == 5


def test_a_layer_too_small_for_a_stream_is_packed() -> None:
    planned = dataclasses.replace(PLANNED, weight_shape=(1, 80))
    assert as_coded(planned, _layer(rows=1)).compressed_bytes == 80 * 5 // 8 + 21 + 4


def test_a_layer_of_blocks_stays_as_planned() -> None:
    planned = dataclasses.replace(PLANNED, codes="blocks", size_bytes=0)
    assert as_coded(planned, _layer()) is planned
    assert planned.compressed_bytes == 60 * 80 + 256 + 4
