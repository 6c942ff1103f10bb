"""Trellis windows: the table, and the weight that codes stand for."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from bgd_plugin.pq.windows import (
    STATES,
    code_bytes_per_column,
    decode_windows,
    decoded_rows,
    packed_states,
    padded_rows,
    window_table,
)
from tests.kernels.window_layers import literal_weight

ROOT = Path(__file__).parents[2]


def _codes(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 256, (code_bytes_per_column(rows), columns), dtype=torch.uint8, generator=generator)


def _scale(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("rows", [16, 17, 18, 19, 40])
def test_weights_are_decoded_as_the_definition_says(rows: int) -> None:
    scale, codes = _scale(rows), _codes(rows, 5)
    assert torch.equal(decode_windows(scale, codes), literal_weight(scale, codes))


@pytest.mark.parametrize("rows", [16, 19, 40])
def test_any_rows_can_be_decoded_by_themselves(rows: int) -> None:
    scale, codes = _scale(rows), _codes(rows, 5)
    wanted = torch.tensor([[0, rows - 1, 3], [7, 0, 8]])
    assert torch.equal(decoded_rows(scale, codes, wanted), decode_windows(scale, codes)[wanted])


def test_codes_of_states_decode_to_the_values_of_the_states() -> None:
    rows, codes = 20, _codes(20, 3)
    columns = codes.T
    two_bits = torch.stack([columns >> shift & 3 for shift in (6, 4, 2, 0)], 2).flatten(1).long()
    states = sum((two_bits.roll(back, 1) << 2 * back for back in range(6)), torch.zeros_like(two_bits))
    assert torch.equal(packed_states(states), codes)
    assert torch.equal(decode_windows(torch.ones(rows), codes), window_table()[states].T)


def test_gradients_reach_the_scale() -> None:
    scale, codes = _scale(16).requires_grad_(), _codes(16, 3)
    decode_windows(scale, codes).sum().backward()
    torch.testing.assert_close(scale.grad, decode_windows(torch.ones(16), codes).sum(1))


def test_the_table_has_the_quantiles_of_a_gaussian_and_branches_far_apart() -> None:
    table = window_table()
    quantiles = torch.tensor([NormalDist().inv_cdf((i + 0.5) / STATES) for i in range(STATES)])
    torch.testing.assert_close(table.sort().values, quantiles, rtol=0, atol=1 / 64)
    branches = table.view(-1, 4).sort(1).values
    assert float((branches[:, 1:] - branches[:, :-1]).min()) > 0.6  # of the middle quarter: 0 to 0.67


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_table_is_exact_in_every_type(dtype: torch.dtype) -> None:
    assert torch.equal(window_table(dtype).float(), window_table())
    assert window_table(dtype) is window_table(dtype)


def test_the_table_never_changes() -> None:
    """Files do not hold it: this number must be the same for ever, and in each process."""
    assert _digest() == 1791286143
    code = "from tests.pq.test_windows import _digest; print(_digest())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=True, capture_output=True, text=True
    )
    assert int(run.stdout) == _digest()


def _digest() -> int:
    return zlib.crc32((window_table() * 32).to(torch.int8).numpy().tobytes())


def test_a_column_takes_whole_bytes() -> None:
    assert [padded_rows(rows) for rows in (16, 17, 20, 21)] == [16, 20, 20, 24]
    assert [code_bytes_per_column(rows) for rows in (16, 17, 20, 21)] == [4, 5, 5, 6]
