"""Peak memory of quantizing a ResNet-18 at 224 px under a bound on calibration values.

Run `python -m tests.benchmarks.memory`. The images are made as they are asked for, so that they count, too. Each run
is a process of its own; what is measured is what the operating system says of it (Linux only), above what it held
before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import resnet18

import bgd_plugin as bgd
from bgd_plugin.support.tables import table


class Images:
    """Random images, made anew at each walk."""

    def __init__(self, count: int, batch_size: int, pixels: int) -> None:
        self.count, self.batch_size, self.pixels = count, batch_size, pixels

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, self.batch_size):
            size = min(self.batch_size, self.count - start)
            yield torch.randn(size, 3, self.pixels, self.pixels, generator=generator)


def resident_mib(field: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the most since the process began or `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """Let `VmHWM` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(options: argparse.Namespace) -> dict[str, float | str]:
    """One run in this process."""
    torch.manual_seed(0)
    model = resnet18().eval()
    config = bgd.BGDConfig.paper("small", method=options.method, batchnorm="matched")
    config = bgd.BGDConfig.from_dict(
        config.to_dict() | {"distillation": None, "finetuning": None, "em_iterations": options.iterations}
    )
    with torch.no_grad():
        model(next(iter(Images(1, 1, options.pixels))))  # what the first forward pass of a process takes for itself
    forget_peak()
    before, start = resident_mib("VmRSS"), time.perf_counter()
    bound = None if options.bound is None else int(options.bound * 2**20)
    data = Images(options.images, options.batch_size, options.pixels)
    result = bgd.quantize(model, data, config, memory_bytes=bound, progress=options.progress)
    seconds, peak = time.perf_counter() - start, resident_mib("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        bgd.save(result.model, Path(folder) / "net.safetensors")
        digest = hash((Path(folder) / "net.safetensors").read_bytes())
    note = next((n for n in result.report.notes if n.startswith("calibration values")), "no bound")
    return {"peak": peak, "seconds": seconds, "digest": digest, "note": note}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=main.__doc__)
    parser.add_argument("--bounds", nargs="+", type=float, default=[512], help="MiB; 0 is no bound")
    parser.add_argument("--methods", nargs="+", default=["em", "full"], choices=["em", "full"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--iterations", type=int, default=100, help="of EM; the peak does not depend on them")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--bound", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.method:
        print(json.dumps(measured(options)))
        return
    rows = []
    same = [f"--iterations={options.iterations}"]
    same += [f"--images={options.images}", f"--batch-size={options.batch_size}", f"--pixels={options.pixels}"]
    for method in options.methods:
        for bound in options.bounds:
            command = [sys.executable, "-m", "tests.benchmarks.memory", f"--method={method}", *same]
            command += [f"--bound={bound}"] if bound else []
            command += ["--progress"] if options.progress else []
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
            rows.append([method, bound or "none", f"{found['peak']:.0f}", f"{found['seconds']:.0f}", found["note"]])
    print(f"{options.images} images at {options.pixels} px, MiB above the process with its model")
    print(table(["method", "bound", "peak", "seconds", "as reported"], rows))


if __name__ == "__main__":
    main()
