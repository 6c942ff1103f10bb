"""A whole ResNet-18 at 224 px: CPU time, calibration work against plain forward passes, peak memory.

Run `python -m tests.benchmarks.resnet18`. Random weights and images serve here: the time does not depend on them.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.models import resnet18

import bgd_plugin as bgd
from bgd_plugin.support.tables import mib, table


def configs() -> dict[str, bgd.BGDConfig]:
    """The paper's fit and the default one, at the paper's small blocks, without training."""
    paper = bgd.BGDConfig.paper("small", distillation=None, finetuning=None)
    full = bgd.BGDConfig.paper("small", method="full", batchnorm="matched", distillation=None, finetuning=None)
    return {"paper": paper, "full": full}


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its CPU seconds, and its wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.resnet18", description=main.__doc__)
    parser.add_argument("--methods", nargs="+", default=["paper", "full"], choices=["paper", "full"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = resnet18().eval()
    images = list(torch.randn(options.images, 3, 224, 224).split(options.batch_size))
    with torch.no_grad():
        model(images[0])
        _, forward, forward_wall = cpu_seconds(lambda: [model(batch) for batch in images])
    rows = []
    for name in options.methods:
        config = configs()[name]
        result, cpu, wall = cpu_seconds(lambda c=config: bgd.quantize(model, images, c, progress=options.progress))
        seconds = result.report.seconds
        calibration = sum(seconds.get(step, 0.0) for step in ("forward", "statistics", "batch norm"))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(
            [
                name,
                f"{cpu:.0f}",
                f"{wall:.0f}",
                f"{calibration / forward_wall:.2f}",
                f"{seconds['fit']:.0f}",
                mib(memory),
            ]
        )
    header = ["method", "CPU-s", "wall s", "calibration / plain forward", "fit, wall s", "peak memory so far"]
    print(f"{options.images} images, plain forward {forward:.1f} CPU-s, {forward_wall:.1f} s")
    print(table(header, rows))


if __name__ == "__main__":
    main()
