"""Writes golden files: small networks as this version compresses them, with the outputs they must give for ever.

Run at every release that changes what is written, and never again for that version:

    python -m tests.golden.make

A file is `NETWORK-VERSION-FORMAT.safetensors`; beside it, `.outputs` holds an input and the network's output. Layers
of 16 rows or more have trellis codes, for which format 4 is written. The files of format 3 held blocks of single
weights whose codes were replaced by walks of an entropy-coded trellis.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.files.format import FORMAT_VERSION
from tests.networks import FunctionalNet, SmallResNet, TwiceNet, images, randomized, vectors

__all__ = ["FOLDER", "NETWORKS", "main"]

FOLDER = Path(__file__).parent
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: SmallResNet().eval(),
    "functional": lambda: FunctionalNet().eval(),
    "twice": lambda: TwiceNet().eval(),
}


def main() -> None:
    """Write the files of this version; those of earlier ones stay."""
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        data: list[Tensor] = vectors() if name == "twice" else images(size=12)
        sizes = dict.fromkeys(("conv", "pointwise_conv", "linear"), bgd.LayerConfig(codes="trellis"))
        config = bgd.BGDConfig(rounds=2, float_storage="float16", max_divergence=None, **sizes)
        model = bgd.quantize(randomized(build()), data, config, progress=False).model
        file = FOLDER / f"{name}-{bgd.__version__}-{FORMAT_VERSION}.safetensors"
        if file.exists():
            raise SystemExit(f"{file.name} is there already: a golden file is never written again")
        bgd.save(model, file)
        with torch.no_grad():
            outputs = {"input": data[0], "output": model(data[0])}
        safetensors.torch.save_file(outputs, FOLDER / f"{file.stem}.outputs")


if __name__ == "__main__":
    main()
