"""How far a process grows while it quantizes: `python -m tests.memory_job KIND...` prints mebibytes. Linux only.

Each kind runs in a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch._dynamo  # Training imports it: once, before the forks.
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.quantization.datafree import quantize_weights
from tests.benchmarks.memory import forget_peak, resident_mib

__all__ = ["BATCHES", "BLOCKS", "COLUMNS", "LAYERS", "TOKENS", "WIDTH", "WIDTH_OF_BLOCK"]

COLUMNS = 1280  # of the layer that "full" is tried on
WIDTH, LAYERS = 1024, 6  # of the network of the other kinds
WIDTH_OF_BLOCK, BLOCKS, TOKENS, BATCHES = 128, 8, 2048, 4  # of the transformer
_LINEAR = bgd.LayerConfig(block_size=4, codebook_size=16)


class Transformer(nn.Module):
    """Blocks of attention and a hidden layer four times as wide; a branch keeps it from being traced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        blocks = (nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(BLOCKS))
        self.first, self.blocks = nn.Linear(width, width), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if x.sum() < 1e9 else x
        return x


def _quantize(kind: str, model: nn.Module, data: list[Tensor]) -> None:
    method: Any = "full" if kind in ("full", "transformer") else "em"
    config = bgd.BGDConfig(
        method=method, em_iterations=2, rounds=1, linear=_LINEAR, max_divergence=None, rotation=False
    )
    if kind == "without data":
        quantize_weights(model, config)
    else:
        bgd.quantize(model, data, config, progress=False)


def _network(kind: str, width: int) -> nn.Module:
    if kind == "transformer":
        return Transformer(width)
    if kind == "full":
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 64, bias=False), nn.BatchNorm1d(64))
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))


def peak(kind: str) -> float:
    """The peak above what the process held before, the network included."""
    largest = {"full": COLUMNS, "transformer": WIDTH_OF_BLOCK}.get(kind, WIDTH)
    found = 0.0
    for width in (32, largest):  # the first one loads what is loaded once
        torch.manual_seed(0)
        model = _network(kind, width).eval()
        shape = {"full": (64, 8), "transformer": (TOKENS // 64, 64, width)}.get(kind, (64, width))
        data = [torch.randn(shape) for _ in range(BATCHES)]
        forget_peak()
        before = resident_mib("VmRSS")
        _quantize(kind, model, data)
        found = resident_mib("VmHWM") - before
    return found


def main(kinds: list[str]) -> None:
    """Print the kinds with their peaks, one a line."""
    torch.set_num_threads(1)
    for kind in kinds:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.stdout.write(f"{kind}: {peak(kind)}\n")
                sys.stdout.flush()
                status = 0
            finally:
                os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(f"{kind} failed")


if __name__ == "__main__":
    main(sys.argv[1:])
