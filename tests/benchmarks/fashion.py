"""ResNet-18 on Fashion-MNIST at the paper's block sizes: test accuracy after every stage of the paper's routine.

Run `python -m tests.benchmarks.fashion`. Stages add up: EM alone, + batch-norm correction, + distillation of each
layer's codewords, + finetuning of all codewords. No label is used after the float network's training; accuracies are of
all 10,000 test images. `--docs` writes the table and the plot.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.calibration import iterate_batches
from bgd_plugin.files.format import file_size, stored
from bgd_plugin.support.tables import mib, table
from bgd_plugin.training import Epochs, finetune_
from tests.benchmarks.fashion_data import FashionData, input_batches, load_fashion_mnist
from tests.benchmarks.fashion_network import FloatNetwork, accuracy_percent, load_or_train

STAGES = ("EM", "+ batch norm", "+ distillation", "+ finetuning")
_SETTINGS = ("images", "batch_size", "distillation_steps", "finetuning_images", "finetuning_epochs")
_DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def paper_config(regime: str, **fields: Any) -> bgd.BGDConfig:
    """The paper's setting for ResNet-18, without training; the small fc of 10 classes bounds its own codebook."""
    pointwise = {"pointwise_block_size": 4} if regime == "large" else {}
    return bgd.BGDConfig.paper(regime, **({"distillation": None, "finetuning": None} | pointwise | fields))


def run(network: FloatNetwork, regime: str, data: FashionData, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each stage: network seed, regime, bytes, test accuracy, seconds."""
    images = data.train_images[: options.images]
    calibration = input_batches(images, options.batch_size)
    distillation = bgd.DistillationConfig(steps=options.distillation_steps, batch_size=options.batch_size)
    configs = {
        STAGES[0]: paper_config(regime, seed=network.seed),
        STAGES[1]: paper_config(regime, seed=network.seed, batchnorm="matched"),
        STAGES[2]: paper_config(regime, seed=network.seed, batchnorm="matched", distillation=distillation),
    }
    rows = []
    for stage, config in configs.items():
        start = time.perf_counter()
        result = bgd.quantize(network.model, calibration, config, progress=options.progress)
        rows.append(_row(network, regime, stage, result.model, data, options, time.perf_counter() - start))
    start = time.perf_counter()
    _finetune(result.model, network.model, data, options)
    rows.append(_row(network, regime, STAGES[3], result.model, data, options, time.perf_counter() - start))
    return rows


def _finetune(student: nn.Module, teacher: nn.Module, data: FashionData, options: argparse.Namespace) -> None:
    """The last stage of `quantize`, on what the stages before it gave."""
    batches = input_batches(data.train_images[: options.finetuning_images], options.batch_size)
    config = bgd.FinetuningConfig(epochs=options.finetuning_epochs, trained="codebooks")

    def epoch(number: int) -> Any:
        order = torch.randperm(len(batches), generator=generator).tolist()
        shuffled = [batches[i] for i in order]
        return iterate_batches(shuffled, student, device=torch.device("cpu"), forward=None)

    generator = torch.Generator().manual_seed(0)
    finetune_(student, teacher, Epochs(epoch), len(batches), config)


def _row(
    network: FloatNetwork,
    regime: str,
    stage: str,
    model: nn.Module,
    data: FashionData,
    options: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    accuracy = accuracy_percent(model.eval(), data)
    print(f"seed {network.seed} {regime} {stage}: {accuracy:.2f}% ({seconds:.0f} s)", flush=True)
    return {
        "seed": network.seed,
        "regime": regime,
        "stage": stage,
        "float": network.test_accuracy_percent,
        "accuracy": accuracy,
        "bytes": file_size(stored(model)),
        "seconds": round(seconds, 1),
        "settings": {name: getattr(options, name) for name in _SETTINGS},
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Seeds side by side, a line for each regime and stage."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for regime in ("small", "large"):
        chosen = [row for row in rows if row["regime"] == regime]
        if chosen:
            lines.append([regime, "float", ""] + [_of(chosen, seed, None) for seed in seeds])
        for stage in dict.fromkeys(row["stage"] for row in chosen):
            size = next(row["bytes"] for row in chosen if row["stage"] == stage)
            lines.append([regime, stage, mib(size)] + [_of(chosen, seed, stage) for seed in seeds])
    return table(["blocks", "stage", "file", *(f"seed {seed}" for seed in seeds)], lines)


def _of(rows: Sequence[dict[str, Any]], seed: int, stage: str | None) -> str:
    for row in rows:
        if row["seed"] == seed and stage in (None, row["stage"]):
            return f"{row['float'] if stage is None else row['accuracy']:.2f}"
    return ""


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy after each stage, one line for each seed and regime, the float network as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, regime in zip(axes, ("small", "large"), strict=True):
        for seed in sorted({row["seed"] for row in rows}):
            chosen = [row for row in rows if row["regime"] == regime and row["seed"] == seed]
            if chosen:
                (line,) = axis.plot([r["stage"] for r in chosen], [r["accuracy"] for r in chosen], marker="o")
                axis.axhline(chosen[0]["float"], linestyle="--", linewidth=1, color=line.get_color())
        axis.set_title(f"{regime} blocks")
        axis.grid(alpha=0.3)
        axis.tick_params(axis="x", labelrotation=15)
    axes[0].set_ylabel("test accuracy, %")
    figure.suptitle("ResNet-18 on Fashion-MNIST; dashed: the float network")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fashion", description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--regimes", nargs="+", default=["small", "large"], choices=["small", "large"])
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with the four idx files")
    parser.add_argument("--images", type=int, default=1024, help="training images for calibration, without labels")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--distillation-steps", type=int, default=40, help="for each layer (paper: 2500)")
    parser.add_argument("--finetuning-images", type=int, default=60000, help="training images, without labels")
    parser.add_argument("--finetuning-epochs", type=int, default=4, help="paper: 9")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--docs", action="store_true", help="merge the rows into docs/benchmarks, and draw the plot")
    options = parser.parse_args(arguments)
    data = load_fashion_mnist(options.data)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        network = load_or_train(seed, data)
        for regime in options.regimes:
            rows += run(network, regime, data, options)
    print(summary(rows))
    if options.docs:
        _write_docs(rows)


def _write_docs(rows: list[dict[str, Any]]) -> None:
    """Put the rows in the place of those of the same seeds and regimes, and draw all of them."""
    _DOCS.mkdir(parents=True, exist_ok=True)
    file = _DOCS / "fashion.json"
    fresh = {(row["seed"], row["regime"]) for row in rows}
    kept = [r for r in json.loads(file.read_text()) if (r["seed"], r["regime"]) not in fresh] if file.exists() else []
    rows = sorted(kept + rows, key=lambda row: (row["regime"] != "small", row["seed"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, _DOCS / "fashion.png")
    print(summary(rows))


if __name__ == "__main__":
    main()
