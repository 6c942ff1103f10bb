"""The pruning chain on the Fashion-MNIST ResNet-18: torch-pruning takes channels out, a short finetuning, quantization.

Run `python -m tests.benchmarks.pruning`; it needs torch-pruning (the extra `pruning`). Sizes are those of files, the
ratio is that of the whole chain, and accuracies are of all 10,000 test images.
"""

import argparse
import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin.tables import mib, table
from tests.benchmarks.fashion_data import (
    FashionData,
    input_batches,
    load_fashion_mnist,
    random_crop_and_flip,
    to_input,
)
from tests.benchmarks.fashion_network import accuracy_percent, load_or_train

logger = logging.getLogger(__name__)

_BATCH = 128
_LEARNING_RATE = 0.03
_TEMPERATURE = 2.0


def pruned(model: nn.Module, ratio: float) -> nn.Module:
    """A copy with `ratio` of each layer's channels taken out, the least of each group by the norm of their weights."""
    result = copy.deepcopy(model)
    classifier = result.get_submodule("fc")
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        result,
        torch.zeros(1, 3, 28, 28),
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=[classifier],
        round_to=8,
    )
    pruner.step()
    return result


def finetune_(student: nn.Module, teacher: nn.Module, data: FashionData, epochs: int, seed: int) -> None:
    """Train a pruned network on the answers of the dense one, softened, on shifted and mirrored training images."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train_images) // _BATCH * _BATCH
    steps = epochs * count // _BATCH
    optimizer = torch.optim.SGD(student.parameters(), lr=_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    student.train()
    for epoch in range(epochs):
        total = torch.zeros(())
        for indices in torch.split(torch.randperm(len(data.train_images), generator=generator)[:count], _BATCH):
            inputs = to_input(random_crop_and_flip(data.train_images[indices], generator, 1))
            with torch.no_grad():
                wanted = functional.log_softmax(teacher(inputs) / _TEMPERATURE, 1)
            answer = functional.log_softmax(student(inputs) / _TEMPERATURE, 1)
            loss = functional.kl_div(answer, wanted, reduction="batchmean", log_target=True) * _TEMPERATURE**2
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        logger.info("epoch %d/%d: loss %.4f", epoch + 1, epochs, float(total) * _BATCH / count)
    student.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pruning", description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ratio", type=float, default=0.5, help="of the channels of each layer")
    parser.add_argument("--epochs", type=int, default=3, help="of finetuning after pruning")
    parser.add_argument("--images", type=int, default=1024, help="for calibration")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data = load_fashion_mnist(options.data)
    calibration = input_batches(data.train_images[: options.images], 64)
    rows: list[list[object]] = []
    for seed in options.seeds:
        dense = load_or_train(seed, data)
        dense_bytes = bgd.plan(dense.model).original_bytes
        start = time.perf_counter()
        network = pruned(dense.model, options.ratio)
        at_once = accuracy_percent(network, data)
        finetune_(network, dense.model, data, options.epochs, seed)
        pruned_bytes = bgd.plan(network).original_bytes
        rows.append([seed, "dense", mib(dense_bytes), "1.0×", f"{dense.test_accuracy_percent:.2f}", ""])
        finetuned = accuracy_percent(network, data)
        note = f"{at_once:.2f} before {options.epochs} epochs; {time.perf_counter() - start:.0f} s"
        rows.append([seed, "pruned", mib(pruned_bytes), f"{dense_bytes / pruned_bytes:.1f}×", f"{finetuned:.2f}", note])
        start = time.perf_counter()
        result = bgd.quantize(network, calibration, progress=False, original_bytes=dense_bytes)
        accuracy = accuracy_percent(result.model, data)
        lost = f"{dense.test_accuracy_percent - accuracy:+.2f} points lost; {time.perf_counter() - start:.0f} s"
        report = result.report
        rows.append([seed, "quantized", mib(report.compressed_bytes), f"{report.ratio:.1f}×", f"{accuracy:.2f}", lost])
    print(table(["seed", "after", "size", "ratio", "accuracy", ""], rows))


if __name__ == "__main__":
    main()
