"""What a run with default settings gives: bytes, divergence and accuracy, beside a budget of the same bytes.

Run `python -m tests.benchmarks.default` (`make bench-default`): networks trained for seconds on scikit-learn's
digits, 512 images to calibrate, 297 others to judge. `--bound` takes another bound than the default one.
"""

import argparse
import time
from collections.abc import Callable

from torch import nn

import bgd_plugin as bgd
from bgd_plugin.config import DEFAULT_DIVERGENCE
from bgd_plugin.support.tables import table
from tests.adapters.digits import DigitsResNet, accuracy, digits, trained_on_digits
from tests.networks import SmallResNet

__all__ = ["NETWORKS", "row"]


class _Perceptron(nn.Sequential):
    """Two hidden layers of 256."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )


class _Narrow(SmallResNet):
    """Three convolutions of 16 channels and fewer."""

    def __init__(self) -> None:
        super().__init__(classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": _Perceptron,
    "narrow ResNet": _Narrow,
    "ResNet-18, an eighth as wide": DigitsResNet,
}


def row(name: str, bound: float) -> list[str]:
    """One network: file, expected and measured divergence, top-1, and that of a budget of the same bytes."""
    model = trained_on_digits(NETWORKS[name])
    data = list(digits()[0][:512].split(64))
    start = time.process_time()
    result = bgd.quantize(model, data, bgd.BGDConfig(max_divergence=bound), progress=False)
    seconds = time.process_time() - start
    report = result.report
    budget = bgd.quantize(model, data, bgd.BGDConfig(target_bytes=report.compressed_bytes), progress=False)
    fixed = bgd.quantize(model, data, bgd.BGDConfig(max_divergence=None), progress=False)
    assert report.answers is not None and report.expected_divergence is not None
    return [
        name,
        f"{accuracy(model):.1%}",
        f"{report.compressed_bytes:,} ({report.ratio:.1f}×)",
        f"{report.expected_divergence:.3g}",
        f"{report.answers.divergence:.3g}",
        f"{accuracy(result.model):.1%}",
        f"{accuracy(budget.model):.1%}",
        f"{fixed.report.compressed_bytes:,}",
        f"{accuracy(fixed.model):.1%}",
        f"{seconds:.1f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bound", type=float, default=DEFAULT_DIVERGENCE)
    options = parser.parse_args()
    header = ["network", "float", "file", "expected", "measured", "top-1", "budget of the same", "fixed sizes", "top-1"]
    print(table([*header, "CPU s"], [row(name, options.bound) for name in NETWORKS]))


if __name__ == "__main__":
    main()
