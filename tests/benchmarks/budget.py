"""Budgets on real architectures: is each one met, from below, and what does choosing cost.

Run `python -m tests.benchmarks.budget`. EfficientNet-Lite0 has its ImageNet weights and the photos of the extra `demo`;
ResNet-18 and MobileNetV3-small have random weights and images. `--quantize` also writes each file, to see that it is
as long as planned.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import copy_module, trace
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.support.tables import table

RATIOS = {"lite0": (7, 9, 11, 13, 15), "resnet18": (12, 20, 30, 43, 100), "mobilenet_v3_small": (6, 8, 10, 12, 15)}


def network_and_images(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A network in evaluation mode, and calibration batches for it."""
    if name == "lite0":
        from bgd_plugin.cli.demo import calibration, network, photos

        return network(), calibration(photos(), 3)
    import torchvision

    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval(), list(torch.randn(64, 3, 224, 224).split(16))


def rows_of(name: str, ratios: Sequence[float], quantize: bool) -> list[list[object]]:
    """One row for each ratio: target, bytes, the share that is used, files written."""
    model, images = network_and_images(name)
    graph = trace(copy_module(model)).eval()
    batches = collect_batches(images, model, device=torch.device("cpu"), forward=None)
    first = bgd.BGDConfig(target_ratio=ratios[0])
    start = time.process_time()
    budget = Budget.of(surveyed(graph, first, original=model))
    assert budget is not None
    sensitivities = measure_sensitivities(graph, batches, budget.free, first, lambda: None)
    seconds = time.process_time() - start
    rows: list[list[object]] = []
    for ratio in ratios:
        config = bgd.BGDConfig(target_ratio=ratio)
        start = time.process_time()
        target = config.budget_bytes(budget.survey.original_bytes) or 0
        survey = replace(budget, target_bytes=target).spend(sensitivities)
        size = budget.sketch.file_size(survey.chosen)
        choosing = time.process_time() - start
        if quantize:
            size = bgd.quantize(model, images, config, progress=False).report.compressed_bytes
        met = "yes" if 0.98 * target <= size <= target else "NO"
        rows.append([name, f"{ratio}×", f"{target:,}", f"{size:,}", f"{size / target:.2%}", met])
        rows[-1] += [f"{seconds:.0f}", f"{choosing:.1f}"]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.budget", description=main.__doc__)
    parser.add_argument("--networks", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--quantize", action="store_true", help="write the files, too")
    options = parser.parse_args(arguments)
    rows = [row for name in options.networks for row in rows_of(name, RATIOS[name], options.quantize)]
    header = ["network", "ratio", "target", "bytes", "used", "met", "measuring, CPU-s", "choosing, CPU-s"]
    print(table(header, rows), flush=True)


if __name__ == "__main__":
    main()
