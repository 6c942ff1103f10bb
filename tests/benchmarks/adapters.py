"""Every framework's entrance against the core, on the Fashion-MNIST ResNet-18: same codes, same accuracy, same bytes.

Run `python -m tests.benchmarks.adapters`; a framework that is not installed is left out and named. transformers gets
its own ResNet with the same weights. Codes are compared bit for bit, and so is everything else that the networks hold;
accuracies are of all 10,000 test images. Bytes are the file of `bgd_plugin.save`, the same for the core and the
framework where both hold the same, and the files that the framework itself writes.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.support.tables import mib, table
from tests.adapters.entrances import ENTRANCES, same_state
from tests.benchmarks.fashion_data import CLASSES, FashionData, input_batches, load_fashion_mnist
from tests.benchmarks.fashion_network import accuracy_percent, load_or_train

_PARTS = {"convolution": "conv", "normalization": "bn"}


class _Logits(nn.Module):
    """A network of transformers that answers as one of torchvision does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def as_transformers(model: nn.Module) -> Any:
    """The ResNet-18 of transformers with the weights of torchvision's."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=len(CLASSES)
    )
    result = ResNetForImageClassification(config)
    state = model.state_dict()
    result.load_state_dict({name: state[torchvision_name(name)] for name in result.state_dict()})
    return result.eval()


def torchvision_name(name: str) -> str:
    """What torchvision calls a tensor of transformers' ResNet-18."""
    *path, part, attribute = name.split(".")
    if "classifier" in path:
        return f"fc.{attribute}"
    if "embedder" in path:
        return f"{_PARTS[part]}1.{attribute}"
    stage, block = int(path[path.index("stages") + 1]), path[path.index("layers") + 1]
    home = f"layer{stage + 1}.{block}"
    if path[-1] == "shortcut":
        return f"{home}.downsample.{int(part == 'normalization')}.{attribute}"
    return f"{home}.{_PARTS[part]}{int(path[-1]) + 1}.{attribute}"


def compare(name: str, network: nn.Module, data: FashionData, expected: Any, options: argparse.Namespace) -> list[Any]:
    """A row of the table for one framework: `expected` is what the core made of the same network."""
    start = time.perf_counter()
    entrance = ENTRANCES[name]
    result = entrance.quantize(copy.deepcopy(network), _batches(name, data, options), options.config)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        entrance.save(result, Path(folder))
        own = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        size = bgd.save(result, Path(folder) / "net.safetensors")
    accuracy = accuracy_percent(_answering(name, result), data)
    same = "yes" if same_state(result, expected.model) else "no"
    core = accuracy_percent(_answering(name, expected.model), data)
    sizes = [f"{expected.report.compressed_bytes:,}", f"{size:,}", mib(own)]
    return [name, same, f"{core:.2f}", f"{accuracy:.2f}", *sizes, f"{seconds:.0f}"]


def _answering(name: str, model: nn.Module) -> nn.Module:
    return _Logits(model) if name == "transformers" else model


def _batches(name: str, data: FashionData, options: argparse.Namespace) -> list[Any]:
    batches = list(input_batches(data.train_images[: options.images], 64))
    return [{"pixel_values": batch} for batch in batches] if name == "transformers" else batches


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.adapters", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the float network")
    parser.add_argument("--frameworks", nargs="+", default=[*ENTRANCES], choices=[*ENTRANCES])
    parser.add_argument("--method", default="full", choices=["full", "em"])
    parser.add_argument("--images", type=int, default=256, help="training images for calibration, without labels")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    options = parser.parse_args(arguments)
    options.config = bgd.BGDConfig(method=options.method, max_divergence=None)
    data = load_fashion_mnist(options.data)
    dense = load_or_train(options.seed, data)
    print(f"float: {dense.test_accuracy_percent:.2f}, {mib(bgd.plan(dense.model).original_bytes)}", flush=True)
    by_core: dict[bool, Any] = {}
    rows = []
    for name in options.frameworks:
        if ENTRANCES[name].missing:
            print(f"{name} is left out: {ENTRANCES[name].missing}", flush=True)
            continue
        theirs = name == "transformers"
        network = as_transformers(dense.model) if theirs else dense.model
        if theirs not in by_core:
            by_core[theirs] = bgd.quantize(network, _batches(name, data, options), options.config, progress=False)
        rows.append(compare(name, network, data, by_core[theirs], options))
        print(*rows[-1], flush=True)
    header = ["framework", "same codes", "core", "adapter", "core, bytes", "adapter, bytes", "own files", "s"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
