"""The Fashion-MNIST ResNet-18 at several ratios: fitted on 256 unlabelled images, then finetuned on unlabelled ones.

Run `python -m tests.benchmarks.fashion_finetuned`. "large" has the paper's large blocks, all else of our defaults, and
comes to 43 times less by the paper's accounting; "large-wide" has so many more codewords that the file itself is 43
times smaller; a number is a `target_ratio`, the float network's bytes over the file's. Finetuning sees the 60,000
training images, shifted and mirrored unless told otherwise (`--plain`), and no label; accuracies are of all 10,000
test images.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin.support.tables import mib, table
from tests.benchmarks.fashion_data import input_batches, load_fashion_mnist, random_crop_and_flip, to_input
from tests.benchmarks.fashion_network import accuracy_percent, load_or_train

_LARGE = bgd.LayerConfig(block_size=18)
_WIDE, _WIDER = (bgd.LayerConfig(block_size=18, codebook_size=k) for k in (512, 1024))


class Images:
    """Unlabelled images: a few as they are for calibration, then all of them in random order.

    Args:
        images: uint8 `[images, 1, 28, 28]`.
        calibration: how many of them calibrate.
        augmented: whether those in random order are shifted and mirrored.
    """

    def __init__(self, images: Tensor, calibration: int, batch_size: int, *, augmented: bool = True) -> None:
        self._images, self._calibration, self._batch_size = images, calibration, batch_size
        self._augmented = augmented
        self._epoch = 0

    def set_epoch(self, number: int) -> None:
        """Called before each walk of finetuning."""
        self._epoch = number

    def __iter__(self) -> Iterator[Tensor]:
        """The batches of one walk."""
        if not self._epoch:
            yield from input_batches(self._images[: self._calibration], 64)
            return
        generator = torch.Generator().manual_seed(self._epoch)
        for chosen in torch.randperm(len(self._images), generator=generator).split(self._batch_size):
            images = self._images[chosen]
            yield to_input(random_crop_and_flip(images, generator, 1) if self._augmented else images)


def config_of(name: str, seed: int, codes: str = "blocks") -> bgd.BGDConfig:
    """The settings of a row, without finetuning; `codes` is how those of a ratio are stored."""
    if name == "large":
        return bgd.BGDConfig(conv=_LARGE, freeze_norms=True, seed=seed, max_divergence=None)
    if name == "large-wide":
        first_stages = (("layer[12].*.conv?", _WIDE),)
        return bgd.BGDConfig(conv=_WIDER, overrides=first_stages, freeze_norms=True, seed=seed, max_divergence=None)
    return bgd.BGDConfig(target_ratio=float(name), freeze_norms=True, seed=seed, codes=codes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fashion_finetuned", description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", default=["large", "43", "60", "100"])
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    parser.add_argument("--images", type=int, default=256, help="for calibration")
    parser.add_argument(
        "--codes", default="blocks", choices=["blocks", "entropy"], help="how a ratio's codes are stored"
    )
    parser.add_argument("--steps", type=int, default=2400, help="of finetuning, 128 images each; 0: none")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--plain", action="store_true", help="finetuning sees images as they are")
    parser.add_argument("--recode-every", type=int, default=None, metavar="STEPS", help="choose codes again")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args(arguments)
    data = load_fashion_mnist(options.data)
    rate = options.learning_rate
    training = bgd.FinetuningConfig(steps=options.steps or 1, learning_rate=rate, recode_every=options.recode_every)
    finetuning = training if options.steps else None
    rows = []
    for seed in options.seeds:
        network = load_or_train(seed, data)
        for size in options.sizes:
            stages = {"fitted": config_of(size, seed, options.codes)}
            if finetuning:
                stages["finetuned"] = dataclasses.replace(stages["fitted"], finetuning=finetuning)
            for stage, chosen in stages.items():
                images = Images(data.train_images, options.images, 128, augmented=not options.plain)
                cpu = time.process_time()
                result = bgd.quantize(network.model, images, chosen, progress=options.progress)
                cpu = time.process_time() - cpu
                report, accuracy = result.report, accuracy_percent(result.model, data)
                rows.append(
                    [seed, size, stage, mib(report.compressed_bytes), f"{report.ratio:.1f}×"]
                    + [f"{network.test_accuracy_percent:.2f}", f"{accuracy:.2f}"]
                    + [f"{accuracy - network.test_accuracy_percent:+.2f}", f"{cpu:.0f}"]
                )
                print(*rows[-1], flush=True)
    header = ["seed", "blocks", "stage", "file", "ratio", "float", "accuracy", "difference", "CPU-s"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
