"""EM and the default method side by side on the Fashion-MNIST ResNet-18: 256 unlabelled images, no training.

Run `python -m tests.benchmarks.fashion_methods`. Both have the paper's block and codebook sizes, the same images and
the same batch-norm correction; accuracies are of all 10,000 test images. The third row has the second one's bytes for a
budget, and chooses the sizes itself.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import bgd_plugin as bgd
from bgd_plugin.support.tables import mib, table
from tests.benchmarks.fashion import paper_config
from tests.benchmarks.fashion_data import input_batches, load_fashion_mnist
from tests.benchmarks.fashion_network import accuracy_percent, load_or_train


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fashion_methods", description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", default=["small", "large"], choices=["small", "large"])
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args(arguments)
    data = load_fashion_mnist(options.data)
    calibration = input_batches(data.train_images[: options.images], 64)
    rows = []
    for seed in options.seeds:
        network = load_or_train(seed, data)
        for regime in options.regimes:
            used = 0
            for method in ("em", "full", "budget"):
                cpu = time.process_time()
                if method == "budget":
                    config = bgd.BGDConfig(target_bytes=used, seed=seed)
                else:
                    config = paper_config(regime, seed=seed, batchnorm="matched", method=method)
                result = bgd.quantize(network.model, calibration, config, progress=False)
                cpu = time.process_time() - cpu
                used = result.report.compressed_bytes
                errors = sorted(layer.relative_error for layer in result.report.layers)
                rows.append(
                    [seed, regime, method, mib(used), f"{network.test_accuracy_percent:.2f}"]
                    + [f"{accuracy_percent(result.model, data):.2f}", f"{errors[len(errors) // 2]:.2%}", f"{cpu:.0f}"]
                )
                print(*rows[-1], flush=True)
    header = ["seed", "blocks", "method", "file", "float", "accuracy", "median layer error", "CPU-s"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
