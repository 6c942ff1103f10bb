"""How far a process grows while it quantizes: `python -m tests.memory_job KIND` prints mebibytes. Linux only."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.quantization.datafree import quantize_weights
from tests.benchmarks.memory import forget_peak, resident_mib

__all__ = ["COLUMNS", "LAYERS", "WIDTH"]

COLUMNS = 2048  # of the layer that "full" is tried on
WIDTH, LAYERS = 1024, 12  # of the network of the other kinds
_LINEAR = bgd.LayerConfig(block_size=4, codebook_size=16)


def _quantize(kind: str, model: nn.Module, data: list[Tensor]) -> None:
    method = "full" if kind == "full" else "em"
    config = bgd.BGDConfig(method=method, em_iterations=2, linear=_LINEAR, max_divergence=None)  # type: ignore[arg-type]
    if kind == "without data":
        quantize_weights(model, config)
    else:
        bgd.quantize(model, data, config, progress=False)


def _network(kind: str, width: int) -> nn.Sequential:
    if kind == "full":
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 64, bias=False), nn.BatchNorm1d(64))
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))


def main(kind: str) -> None:
    """Print the peak above what the process held before, the network included."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width in (64, COLUMNS if kind == "full" else WIDTH):  # the first one loads what is loaded once
        model = _network(kind, width).eval()
        data = [torch.randn(64, 8 if kind == "full" else width) for _ in range(4)]
        forget_peak()
        before = resident_mib("VmRSS")
        _quantize(kind, model, data)
        peak = resident_mib("VmHWM") - before
    sys.stdout.write(f"{peak}\n")


if __name__ == "__main__":
    main(sys.argv[1])
