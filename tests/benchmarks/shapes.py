"""A small Mask R-CNN on pictures of shapes: average precision before, after the fit, and after finetuning.

Run `python -m tests.benchmarks.shapes`; needs pycocotools. The float network is trained with labels (about 15
CPU-minutes on one core, then kept in .cache); compression and finetuning see pictures only.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.tables import mib
from tests.benchmarks.shapes_data import average_precision, batches, samples
from tests.benchmarks.shapes_network import load_or_train

_OUTPUTS = ("backbone", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor")


def main() -> None:
    """Train, compress, finetune, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="of the float network's training")
    parser.add_argument("--images", type=int, default=64, help="for calibration")
    parser.add_argument("--finetuning-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--test-images", type=int, default=300)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_or_train(options.steps)
    test = samples(options.test_images, seed=7)
    print("| network | file | ratio | box AP | mask AP | seconds |\n|---|---|---|---|---|---|", flush=True)
    _row("float", None, model, test, 0.0)
    calibration = [(images,) for images, _ in batches(samples(options.images, seed=8), 8)]
    settings: dict[str, Any] = {"conv": LayerConfig(block_size=9), "linear": LayerConfig(block_size=8)}
    finetuning = bgd.FinetuningConfig(
        steps=options.finetuning_steps, learning_rate=options.learning_rate, outputs=_OUTPUTS
    )
    for name, extra in (("fitted", {}), ("and finetuned", {"finetuning": finetuning})):
        start = time.perf_counter()
        config = bgd.BGDConfig(**settings, **extra)
        result = bgd.quantize(model, calibration, config, progress=False)
        _row(name, result.report, result.model, test, time.perf_counter() - start)


def _row(name: str, report: bgd.Report | None, model: Any, test: Any, seconds: float) -> None:
    box, mask = average_precision(model, test)
    size, ratio = ("", "") if report is None else (mib(report.compressed_bytes), f"{report.ratio:.1f}×")
    print(f"| {name} | {size} | {ratio} | {box:.1f} | {mask:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
