"""The float network of the Fashion-MNIST benchmarks: torchvision's ResNet-18, trained once per seed and kept.

Run `python -m tests.benchmarks.fashion_network --seed 0 1 2` to train (about a minute an epoch on two cores); the other
benchmarks call `load_or_train`, which reuses the file. The network is torchvision's own, ImageNet stem included, so
that the byte counts are those of the ResNet-18 that everybody knows; the 28 px images go in at their native size.

On a machine shared with other work set `OMP_WAIT_POLICY=PASSIVE`: threads that wait then leave their core to the
others. Training is plain float32: bfloat16 autocast was measured slower at this image size, on a CPU with bfloat16
units, because the last stage works on a single pixel.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from tests.benchmarks.fashion_data import (
    CACHE,
    CLASSES,
    FashionData,
    input_batches,
    load_fashion_mnist,
    random_crop_and_flip,
    to_input,
)

__all__ = ["FloatNetwork", "TrainingConfig", "accuracy_percent", "build_network", "load_or_train", "weights_path"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the float network is trained; stored with the weights, so that weights of another recipe are never reused.

    SGD with Nesterov momentum under a one-cycle schedule (Smith and Topin, arXiv 1708.07120); weight decay on weight
    matrices and kernels only, not on biases and norms. Images are mirrored and shifted by up to `crop_padding` pixels:
    the stem halves the 28 px twice, so that one pixel is much already (one seed, three epochs, on 5,000 training images
    kept aside: 90.8% right with one pixel, 89.6% with two).
    """

    epochs: int = 10
    batch_size: int = 128
    peak_learning_rate: float = 0.1
    warmup_fraction: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    crop_padding: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, found {self.epochs} and {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class FloatNetwork:
    """A trained network in evaluation mode, with its accuracy on all 10,000 test images and its training time."""

    model: nn.Module
    seed: int
    test_accuracy_percent: float
    training_seconds: float
    path: Path


def build_network() -> nn.Module:
    """The ResNet-18 of torchvision, random weights; input `[images, 3, 28, 28]`, output `[images, 10]`."""
    network: nn.Module = resnet18(num_classes=len(CLASSES))
    return network


def weights_path(seed: int) -> Path:
    """Where the weights of one seed are kept (safetensors; settings, accuracy and time are in its header)."""
    return CACHE / f"resnet18-seed{seed}.safetensors"


def load_or_train(
    seed: int, data: FashionData | None = None, config: TrainingConfig | None = None, *, retrain: bool = False
) -> FloatNetwork:
    """The float network of a seed: from the cache where it was trained by the same settings, else trained and kept.

    Args:
        seed: of the initial weights, the order of the images and their augmentation.
        data: only needed for training; loaded when it is and none is given.
        config: defaults to `TrainingConfig()`.
        retrain: train even where the cache has the network.
    """
    config = config or TrainingConfig()
    path = weights_path(seed)
    if not retrain and path.is_file():
        cached = _load(path, seed, config)
        if cached is not None:
            return cached
        logger.warning("%s was trained with other settings; training again", path)
    data = data or load_fashion_mnist()
    start = time.perf_counter()
    model = train(data, seed, config)
    network = FloatNetwork(
        model=model,
        seed=seed,
        test_accuracy_percent=accuracy_percent(model, data),
        training_seconds=time.perf_counter() - start,
        path=path,
    )
    _save(network, config)
    return network


def train(data: FashionData, seed: int, config: TrainingConfig) -> nn.Module:
    """A ResNet-18 trained on the 60,000 training images, in evaluation mode; the test images are not looked at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_network()
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, config)
    step_count = config.epochs * (len(data.train_labels) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.peak_learning_rate,
        total_steps=step_count,
        pct_start=config.warmup_fraction,
        cycle_momentum=False,
    )
    model.train()
    start = time.perf_counter()
    for epoch in range(config.epochs):
        loss = _train_epoch(model, data, optimizer, schedule.step, generator, config)
        passed = time.perf_counter() - start
        left = passed / (epoch + 1) * (config.epochs - epoch - 1)
        logger.info("epoch %d/%d: loss %.4f, %.0f s, %.0f s left", epoch + 1, config.epochs, loss, passed, left)
    return model.eval()


@torch.no_grad()
def accuracy_percent(model: Callable[[Tensor], Tensor], data: FashionData, batch_size: int = 500) -> float:
    """Top-1 on all 10,000 test images, 0..100; `model` is called as it stands (put it into evaluation mode first)."""
    predicted = torch.cat([model(batch).argmax(1) for batch in input_batches(data.test_images, batch_size)])
    return 100 * float((predicted == data.test_labels).double().mean())


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.SGD(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.peak_learning_rate,
        momentum=config.momentum,
        nesterov=True,
        fused=True,
    )


def _train_epoch(
    model: nn.Module,
    data: FashionData,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None],
    generator: torch.Generator,
    config: TrainingConfig,
) -> float:
    """One walk over the shuffled images, an incomplete last batch left out; returns the mean loss."""
    count = len(data.train_labels)
    order = torch.randperm(count, generator=generator)[: count - count % config.batch_size]
    total = 0.0
    batches = torch.split(order, config.batch_size)
    for indices in batches:
        inputs = to_input(random_crop_and_flip(data.train_images[indices], generator, config.crop_padding))
        logits = model(inputs)
        loss = functional.cross_entropy(logits, data.train_labels[indices], label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        after_step()
        total += loss.item()
    return total / len(batches)


def _save(network: FloatNetwork, config: TrainingConfig) -> None:
    """Write beside the final name, then rename: a run that is stopped leaves no half file behind that name."""
    network.path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "config": json.dumps(asdict(config), sort_keys=True),
        "seed": str(network.seed),
        "test_accuracy_percent": repr(network.test_accuracy_percent),
        "training_seconds": repr(network.training_seconds),
        "torch": torch.__version__,
    }
    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    unfinished = network.path.with_suffix(".unfinished")
    safetensors.torch.save_file(state, unfinished, metadata=header)
    os.replace(unfinished, network.path)


def _load(path: Path, seed: int, config: TrainingConfig) -> FloatNetwork | None:
    """The cached network, or None where its header names other settings."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("config") != json.dumps(asdict(config), sort_keys=True):
            return None
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    model = build_network()
    model.load_state_dict(state)
    return FloatNetwork(
        model=model.eval(),
        seed=seed,
        test_accuracy_percent=float(header["test_accuracy_percent"]),
        training_seconds=float(header["training_seconds"]),
        path=path,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train (or find) the networks of the given seeds and print their test accuracy."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fashion_network", description=main.__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one network each")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    parser.add_argument("--epochs", type=int, default=TrainingConfig.epochs)
    parser.add_argument("--threads", type=int, default=2, help="of torch; another number gives slightly other weights")
    parser.add_argument("--retrain", action="store_true", help="train even where the cache has the network")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    data = load_fashion_mnist(options.data)
    config = TrainingConfig(epochs=options.epochs)
    for seed in options.seed:
        network = load_or_train(seed, data, config, retrain=options.retrain)
        print(
            f"seed {seed}: {network.test_accuracy_percent:.2f}% of the 10,000 test images, "
            f"trained in {network.training_seconds:.0f} s, {network.path}",
            flush=True,
        )


if __name__ == "__main__":
    main()
