"""A small Mask R-CNN on pictures of shapes: average precision before, after the fit, and after finetuning.

Run `python -m tests.benchmarks.shapes`; needs pycocotools. The float network is trained with labels (about 15
CPU-minutes on one core, then kept in .cache); compression and finetuning see pictures only. There is no end of those,
so finetuning sees each once. As in the paper, large layers have larger blocks than small ones, and heads stay float.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.support.tables import mib
from tests.benchmarks.shapes_data import average_precision, batches, samples
from tests.benchmarks.shapes_network import load_or_train

_OUTPUTS = ("backbone", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor")
_SIZES: dict[str, Any] = {
    "conv": LayerConfig(block_size=3),
    "pointwise_conv": LayerConfig(block_size=2),
    "overrides": (
        ("backbone.stages.2.conv*", LayerConfig(block_size=9, codebook_size=512)),
        ("roi_heads.box_head.fc6", LayerConfig(block_size=8)),
        ("roi_heads.box_head.fc7", LayerConfig(block_size=4, codebook_size=128)),
        ("rpn.head.cls_logits", None),
        ("rpn.head.bbox_pred", None),
        ("roi_heads.mask_predictor.mask_fcn_logits", None),
        ("roi_heads.box_predictor.cls_score", LayerConfig(block_size=2)),
        ("roi_heads.box_predictor.bbox_pred", LayerConfig(block_size=2)),
    ),
}
_BATCH = 8


class Pictures:
    """Unlabelled pictures: the same few for each calibration, new ones for each walk of finetuning."""

    def __init__(self, count: int) -> None:
        self._count, self._epoch = count, 0

    def set_epoch(self, number: int) -> None:
        """Called before each walk of finetuning."""
        self._epoch = number

    def __iter__(self) -> Iterator[tuple[list[Tensor]]]:
        """The batches of one walk."""
        for images, _ in batches(samples(self._count, seed=1000 + self._epoch), _BATCH):
            yield (images,)


def main() -> None:
    """Train, compress, finetune, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="of the float network's training")
    parser.add_argument("--images", type=int, default=128, help="for calibration, and in each walk of finetuning")
    parser.add_argument("--finetuning-steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--test-images", type=int, default=300)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_or_train(options.steps)
    test = samples(options.test_images, seed=7)
    print("| network | file | ratio | box AP | mask AP | seconds |\n|---|---|---|---|---|---|", flush=True)
    _row("float", None, model, test, 0.0)
    pictures = Pictures(options.images)
    finetuning = bgd.FinetuningConfig(
        steps=options.finetuning_steps, learning_rate=options.learning_rate, outputs=_OUTPUTS
    )
    for name, extra in (("fitted", {}), ("and finetuned", {"finetuning": finetuning})):
        start = time.perf_counter()
        pictures.set_epoch(0)
        config = bgd.BGDConfig(**_SIZES, freeze_norms=True, **extra, max_divergence=None)
        result = bgd.quantize(model, pictures, config, progress=False)
        _row(name, result.report, result.model, test, time.perf_counter() - start)


def _row(name: str, report: bgd.results.Report | None, model: Any, test: Any, seconds: float) -> None:
    box, mask = average_precision(model, test)
    size, ratio = ("", "") if report is None else (mib(report.compressed_bytes), f"{report.ratio:.1f}×")
    print(f"| {name} | {size} | {ratio} | {box:.1f} | {mask:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
