"""The Triton kernel under Triton's interpreter, which runs it on a CPU: no device is needed, and nothing is timed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import itertools
import torch
from bgd_plugin.kernels.triton_linear import triton_linear
from tests.kernels.test_linear import ROUNDING, layer, plain

torch.manual_seed(0)
shapes = [(66, 5, 4, 256), (3, 8, 9, 300), (5, 2, 1, 40000), (1, 1, 70, 2)]
leads = itertools.cycle([(1,), (2, 9), (0,), ()])
for (rows, blocks, size, codewords), dtype in itertools.product(shapes, ROUNDING):
    codebook, codes = layer(rows, blocks, size, codewords, dtype)
    x = torch.randn(*next(leads), blocks * size).to(dtype)
    for has_mask, has_bias in ((False, False), (True, True), (True, False)):
        mask = torch.rand(rows, blocks * size) > 0.5 if has_mask else None
        bias = torch.randn(rows).to(dtype) if has_bias else None
        found, expected = triton_linear(x, codebook, codes, mask, bias), plain(x, codebook, codes, mask, bias)
        assert found.shape == expected.shape and found.dtype == dtype
        if found.numel():
            error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
            assert error <= ROUNDING[dtype], (rows, blocks, size, codewords, dtype, has_mask, has_bias, error)
print("all close")
"""


def test_it_is_what_the_plain_path_computes() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all close", done.stderr[-2000:]
