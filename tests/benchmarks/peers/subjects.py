"""The networks that are compressed, the images that calibrate them, and the images that judge them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bgd_plugin.cli.demo import PREPROCESSING, calibration, network, photos
from bgd_plugin.cli.images import labelled, opened
from tests.benchmarks.fashion_data import input_batches, load_fashion_mnist
from tests.benchmarks.fashion_network import load_or_train

__all__ = ["SUBJECTS", "Subject", "fashion", "lite0"]

_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A float network with its data.

    Attributes:
        name: of the network.
        images: how many calibrate and how many judge, in words.
        calibration: batches without labels.
        judged: batches that no fit sees.
        labels: int64, of the judged images in their order.
    """

    name: str
    images: str
    model: nn.Module
    calibration: Sequence[Tensor]
    judged: Sequence[Tensor]
    labels: Tensor

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Top-1 in percent, top-1 agreement with the float network in percent, mean KL(float ‖ model) in nats."""
        mine, theirs = self._logits(model), self._float_logits
        divergence = functional.kl_div(mine.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="none")
        answers = mine.argmax(1)
        return {
            "top1": 100 * float((answers == self.labels).double().mean()),
            "agreement": 100 * float((answers == theirs.argmax(1)).double().mean()),
            "kl": float(divergence.sum(1).mean()),
        }

    @cached_property
    def _float_logits(self) -> Tensor:
        return self._logits(self.model)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        return torch.cat([model(batch) for batch in self.judged]).double()


def fashion(options: Any) -> Subject:
    """ResNet-18 on Fashion-MNIST: 256 training images calibrate, all 10,000 test images judge."""
    data = load_fashion_mnist(options.data)
    images = 256
    return Subject(
        name="Fashion-MNIST ResNet-18",
        images=f"{images} training images calibrate, all {len(data.test_labels):,} test images judge",
        model=load_or_train(0, data).model,
        calibration=input_batches(data.train_images[:images], 64),
        judged=input_batches(data.test_images, 500),
        labels=data.test_labels,
    )


def lite0(options: Any) -> Subject:
    """EfficientNet-Lite0 on a folder of labelled photos, one half to calibrate and the other to judge.

    Without a folder, the demo's 20 photos judge, and random crops of the same photos calibrate: a check that all works,
    not a measurement.
    """
    if options.photos is None:
        files = [(path, int(path.stem.split("_")[-1])) for path in photos()]
        batches = calibration([path for path, _ in files], 6)
        said = f"{sum(map(len, batches))} crops of {len(files)} photos calibrate, the same photos judge"
    else:
        files = labelled(options.photos)
        random.Random(options.split).shuffle(files)
        half = len(files) // 2
        batches = _pictures([path for path, _ in files[:half]])
        files = files[half:]
        said = f"{half} photos calibrate, {len(files)} others judge (split {options.split})"
    last = torch.channels_last  # depthwise convolutions on a CPU are several times faster in this order
    return Subject(
        name="EfficientNet-Lite0",
        images=said,
        model=network().to(memory_format=last),  # type: ignore[call-overload]
        calibration=[batch.contiguous(memory_format=last) for batch in batches],
        judged=_pictures([path for path, _ in files]),
        labels=torch.tensor([label for _, label in files]),
    )


def _pictures(files: Sequence[Path]) -> list[Tensor]:
    stacked = torch.stack([PREPROCESSING(opened(path)) for path in files])
    return [batch.contiguous(memory_format=torch.channels_last) for batch in stacked.split(_BATCH)]


SUBJECTS = {"fashion": fashion, "lite0": lite0}
