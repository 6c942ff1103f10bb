"""One process against two on a ResNet-18: the same codes, the same answers, and how fast calibration is.

Run `python -m tests.benchmarks.distributed`; with `--trained SEED`, the network of the Fashion-MNIST benchmarks on its
own images, with its accuracy on all test images, and how far the Grams are apart. With `--on-paper` it prints, for each
layer, the bytes that are summed over the processes, and how long that takes at a given bandwidth; nothing is measured
then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

import bgd_plugin as bgd
import bgd_plugin.fitting.method_full_gram
from bgd_plugin.nn import PQModule
from bgd_plugin.pq.gram import MomentSums
from bgd_plugin.support.processes import process_group
from bgd_plugin.support.tables import mib, table
from tests.benchmarks.fashion_data import input_batches, load_fashion_mnist
from tests.benchmarks.fashion_network import accuracy_percent, load_or_train

# Bytes each second that one process sends: within a machine of eight GPUs (NVLink), and from machine to machine
# (100 Gbit/s).
BANDWIDTHS = {"8 GPUs, one machine": (8, 200e9), "64 machines": (64, 10e9)}
STEPS = ("forward", "statistics", "batch norm")


def config(method: str, iterations: int) -> bgd.BGDConfig:
    """The paper's small blocks, without training."""
    paper = bgd.BGDConfig.paper("small", distillation=None, finetuning=None, batchnorm="matched")
    return bgd.BGDConfig.from_dict(paper.to_dict() | {"method": method, "em_iterations": iterations})


def network(trained: int | None) -> nn.Module:
    """A ResNet-18, the same in every process: of random weights, or trained with that seed."""
    if trained is not None:
        return load_or_train(trained).model
    torch.manual_seed(0)
    return resnet18().eval()


def batches(options: argparse.Namespace) -> list[Tensor]:
    """All calibration batches."""
    if options.trained is not None:
        return input_batches(load_fashion_mnist().train_images[: options.images], options.batch_size)
    images = torch.randn(options.images, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return list(images.split(options.batch_size))


class Sketches(MomentSums):
    """Moments that note down each Gram, once it is summed over all processes, times some random vectors."""

    noted: ClassVar[dict[str, Tensor]] = {}

    def share_(self) -> None:
        """As ever."""
        super().share_()
        gram = self.sums[0] / max(1, self.count)
        vectors = torch.randn(gram.shape[2], 16, generator=torch.Generator().manual_seed(0))
        self.noted[str(len(self.noted))] = gram @ vectors


def worker(options: argparse.Namespace) -> None:
    """One process."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        rank, size = dist.get_rank(), dist.get_world_size()
        part = batches(options)[rank::size]
        bgd_plugin.fitting.method_full_gram.MomentSums = Sketches  # type: ignore[misc]
        dist.barrier()
        start = time.perf_counter()
        result = bgd.quantize(
            network(options.trained), part, config(options.method, options.iterations), progress=False
        )
        seconds = result.report.seconds | {"all": time.perf_counter() - start}
        if rank == 0:
            bgd.save(result.model, options.output / f"{size}.safetensors")
            (options.output / f"{size}.json").write_text(json.dumps(seconds))
            safetensors.torch.save_file(Sketches.noted, options.output / f"{size}.grams")


def compared(folder: Path, trained: int | None) -> str:
    """How far one process and two agree, in words."""
    one, two = (bgd.load(folder / f"{size}.safetensors", like=network(trained)).eval() for size in (1, 2))
    same = total = 0
    worst = 0.0
    for name, layer in one.named_modules():
        if isinstance(layer, PQModule):
            other = two.get_submodule(name)
            same, total = same + int((layer.codes == other.codes).sum()), total + layer.codes.numel()
            difference = (layer.codebook - other.codebook).norm() / layer.codebook.norm()
            worst = max(worst, float(difference.detach()))
    said = [f"same codes: {same / total:.4%}; codebooks differ by {worst:.2e} at most"]
    grams, others = (safetensors.torch.load_file(folder / f"{size}.grams") for size in (1, 2))
    if grams:
        apart = [float((others[i] - grams[i]).norm() / grams[i].norm()) for i in sorted(grams, key=int)]
        said.append(f"Grams differ by {apart[0]:.2e} in the first layer, {max(apart):.2e} at most")
    if trained is None:
        images = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            answers = [net(images).argmax(1) for net in (one, two)]
        said.append(f"same answers: {float((answers[0] == answers[1]).double().mean()):.2%}")
    else:
        data = load_fashion_mnist()
        accuracies = [accuracy_percent(net, data) for net in (network(trained), one, two)]
        said.append("accuracy of the float network, with 1 and with 2: " + ", ".join(f"{a:.2f}%" for a in accuracies))
    return "\n".join(said)


def on_paper() -> None:
    """Bytes and seconds of the sums, layer by layer."""
    for name, make in (("ResNet-18", resnet18), ("ResNet-50", resnet50)):
        rows, sums = [], dict.fromkeys(("em", "full"), 0)
        for layer in bgd.plan(make(), config("full", 1)).layers:
            outputs, columns = layer.weight_shape[0], layer.weights // layer.weight_shape[0]
            sent = {"em": 8 * layer.block_size**2, "full": 2 * 8 * (columns + 1) * (columns + outputs)}
            row = [layer.name, columns, outputs]
            for method, size in sent.items():
                sums[method] += size
                row += [mib(size), *(f"{_milliseconds(size, *of):.2f}" for of in BANDWIDTHS.values())]
            rows.append(row)
        rows.append(["all", "", "", *(x for s in sums.values() for x in (mib(s), *_all(s)))])
        columns_of = [f"{method}: {what}" for method in sums for what in ("bytes", *(f"ms, {b}" for b in BANDWIDTHS))]
        print(f"{name}\n" + table(["layer", "D", "rows", *columns_of], rows) + "\n")


def _all(size: int) -> list[str]:
    return [f"{_milliseconds(size, *of):.1f}" for of in BANDWIDTHS.values()]


def _milliseconds(size: int, processes: int, bandwidth: float) -> float:
    """Of a ring: each process sends 2 (n - 1) / n of the bytes."""
    return 1e3 * 2 * (processes - 1) / processes * size / bandwidth


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.distributed", description=main.__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--method", choices=["em", "full"], default="em")
    parser.add_argument("--iterations", type=int, default=100, help="of EM")
    parser.add_argument("--trained", type=int, metavar="SEED", help="of a trained network; without it, random weights")
    parser.add_argument("--on-paper", action="store_true")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.on_paper:
        on_paper()
        return
    if options.output:
        worker(options)
        return
    same = [f"--images={options.images}", f"--batch-size={options.batch_size}", f"--method={options.method}"]
    same += [] if options.trained is None else [f"--trained={options.trained}"]
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        for size in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"]
            command += ["tests.benchmarks.distributed", *same, f"--iterations={options.iterations}", f"--output={name}"]
            subprocess.run(command, check=True)
            seconds = json.loads((folder / f"{size}.json").read_text())
            calibration = sum(seconds.get(step, 0.0) for step in STEPS)
            rate = options.images / calibration
            rows.append([size, f"{calibration:.1f}", f"{rate:.2f}", f"{seconds['fit']:.1f}", f"{seconds['all']:.1f}"])
        print(table(["processes", "calibration, s", "images / s", "fit, s", "all, s"], rows))
        print(compared(folder, options.trained))


if __name__ == "__main__":
    main()
