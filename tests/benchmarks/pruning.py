"""The pruning chain on the Fashion-MNIST ResNet-18: pruning, a short finetuning, quantization.

Run `python -m tests.benchmarks.pruning`; it needs torch-pruning (the extra `pruning`), which takes half of the channels
out. With `--kinds 2:4` masks take half of the weights instead, and their zeros are preserved. The size of the quantized
network is its file's, the ratio is that of the whole chain, and accuracies are of all 10,000 test images.
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
from torch.nn.utils import prune

import bgd_plugin as bgd
from bgd_plugin.support.tables import mib, table
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


def masked(model: nn.Module) -> nn.Module:
    """A copy with 2:4 masks on all convolutions but the first: of four input channels the two larger weights stay."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels % 4 == 0:
            along = module.weight.detach().abs().movedim(1, -1)
            groups = along.reshape(-1, 4)
            mask = torch.zeros_like(groups).scatter_(1, groups.topk(2, 1).indices, 1.0)
            prune.custom_from_mask(module, "weight", mask.reshape(along.shape).movedim(-1, 1))
    return result


def zeros(model: nn.Module) -> int:
    """Weights of convolutions that are exactly zero."""
    convolutions = (m for m in bgd.materialize(model).modules() if isinstance(m, nn.Conv2d))
    return sum(int((conv.weight == 0).sum()) for conv in convolutions)


def chain(kind: str, seed: int, data: FashionData, options: argparse.Namespace) -> list[list[object]]:
    """A row for the network after each step: dense, pruned and finetuned, quantized."""
    dense = load_or_train(seed, data)
    dense_bytes = bgd.plan(dense.model).original_bytes
    start = time.perf_counter()
    network = pruned(dense.model, options.ratio) if kind == "channels" else masked(dense.model)
    at_once = accuracy_percent(network, data)
    finetune_(network, dense.model, data, options.epochs, seed)
    pruned_bytes = bgd.plan(network).original_bytes
    finetuned = accuracy_percent(network, data)
    trained = f"{at_once:.2f} before {options.epochs} epochs; {time.perf_counter() - start:.0f} s"
    start = time.perf_counter()
    calibration = input_batches(data.train_images[: options.images], 64)
    config = bgd.BGDConfig(preserve_zeros=kind == "2:4", max_divergence=None)
    result = bgd.quantize(network, calibration, config, progress=False, original_bytes=dense_bytes)
    accuracy, report = accuracy_percent(result.model, data), result.report
    lost = f"{dense.test_accuracy_percent - accuracy:+.2f} points lost; {time.perf_counter() - start:.0f} s"
    if config.preserve_zeros:
        lost += f"; {zeros(network):,} zeros in the pruned network, {zeros(result.model):,} in the decoded one"
    return [
        [seed, kind, "dense", mib(dense_bytes), "1.0×", f"{dense.test_accuracy_percent:.2f}", ""],
        [seed, kind, "pruned", mib(pruned_bytes), f"{dense_bytes / pruned_bytes:.1f}×", f"{finetuned:.2f}", trained],
        [seed, kind, "quantized", mib(report.compressed_bytes), f"{report.ratio:.1f}×", f"{accuracy:.2f}", lost],
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pruning", description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=["channels"], choices=["channels", "2:4"])
    parser.add_argument("--ratio", type=float, default=0.5, help="of the channels of each layer")
    parser.add_argument("--epochs", type=int, default=3, help="of finetuning after pruning")
    parser.add_argument("--images", type=int, default=1024, help="for calibration")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data = load_fashion_mnist(options.data)
    rows = [row for seed in options.seeds for kind in options.kinds for row in chain(kind, seed, data, options)]
    print(table(["seed", "pruned", "after", "size", "ratio", "accuracy", ""], rows))


if __name__ == "__main__":
    main()
