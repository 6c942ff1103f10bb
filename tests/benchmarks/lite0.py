"""EfficientNet-Lite0 on real photos at one size: what each step of the method brings, without and with training.

Run `python -m tests.benchmarks.lite0 --photos FOLDER` (`make bench-lite0`): one half of the folder's labelled images
(NAME_CLASS.jpg) calibrates, without labels, the other half judges, and `--splits` are seeds of the halves. Without a
folder the demo's 20 photos stand in, which shows that all works and measures nothing.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.support.tables import mib, table
from tests.benchmarks.peers.subjects import Subject, lite0

BUDGET = bgd.BGDConfig(target_bytes=1_705_000, freeze_norms=True, kept_aside=0.0)
"""All photos of the first half calibrate, since those of the other half judge."""
_BATCH = 25


class Crops:
    """The calibration photos: as they are on the first walk, then shuffled, in random crops, some of them mirrored."""

    def __init__(self, photos: Sequence[Tensor]) -> None:
        self._photos = torch.cat(list(photos))
        self._walk = 0

    def set_epoch(self, number: int) -> None:
        """Called before each walk of finetuning."""
        self._walk = number

    def __iter__(self) -> Iterator[Tensor]:
        """The batches of one walk."""
        from torchvision.transforms import v2

        crop = v2.Compose([v2.RandomResizedCrop(self._photos.shape[2:], (0.5, 1.0)), v2.RandomHorizontalFlip()])
        order = torch.arange(len(self._photos))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._walk)
            if self._walk:
                order = torch.randperm(len(order))
            for chosen in order.split(_BATCH):
                photos = self._photos[chosen]
                photos = torch.stack([crop(photo) for photo in photos]) if self._walk else photos
                yield photos.contiguous(memory_format=torch.channels_last)


def arms(
    report: bgd.results.Report, names: Sequence[str], training: bgd.FinetuningConfig, budget: bgd.BGDConfig = BUDGET
) -> dict[str, bgd.BGDConfig]:
    """Settings by name. Those of single steps have the sizes that the budget chose, and differ in nothing else.

    Args:
        report: of the budget alone.
        names: of all layers that could be quantized.
        training: the finetuning.
        budget: the settings of `report`.
    """
    sizes: dict[str, bgd.LayerConfig | None] = dict.fromkeys(names)
    for layer in report.layers:
        sizes[layer.name] = bgd.LayerConfig(block_size=layer.block_size, codebook_size=layer.codebook_size)
    chosen = replace(budget, target_bytes=None, max_divergence=None, overrides=tuple(sizes.items()))
    plain = replace(chosen, asymmetric_step=0.0, refit_depthwise=False)
    return {
        "uniform, EM": bgd.BGDConfig(method="em", max_divergence=None),
        "uniform": bgd.BGDConfig(max_divergence=None),
        "sizes, EM, norms kept": replace(chosen, method="em", batchnorm="keep"),
        "sizes, EM": replace(chosen, method="em"),
        "sizes, full Gram, norms kept": replace(plain, batchnorm="keep"),
        "sizes, full Gram": plain,
        "sizes, full Gram, depthwise": replace(plain, refit_depthwise=True),
        "sizes, full Gram, targets": replace(chosen, refit_depthwise=False),
        "sizes, half precision": replace(chosen, codebook_storage="float16", weight_storage="float16"),
    } | stages(training, budget)


def stages(training: bgd.FinetuningConfig, budget: bgd.BGDConfig = BUDGET) -> dict[str, bgd.BGDConfig]:
    """Those of the settings by name that choose sizes themselves; arguments as of `arms`."""
    again = replace(training, layers=(), recode_every=max(1, (training.steps or 0) // 10))
    return {
        "budget, lean": replace(budget, weight_storage="int5"),
        "budget, entropy-coded": replace(budget, codes="entropy"),
        "budget, reconstruction": replace(budget, reconstruction=bgd.ReconstructionConfig()),
        "budget, finetuning": replace(budget, finetuning=training),
        "finetuning, entropy-coded": replace(budget, codes="entropy", finetuning=training),
        "finetuning and codes, entropy-coded": replace(budget, codes="entropy", finetuning=again),
    }


def compress(subject: Subject, config: bgd.BGDConfig) -> tuple[bgd.results.Report, dict[str, float]]:
    """Compress and judge."""
    start = time.process_time()
    result = bgd.quantize(subject.model, Crops(subject.calibration), config, progress=False)
    row = {"bytes": result.report.compressed_bytes, "cpu_seconds": time.process_time() - start}
    return result.report, row | subject.judge(result.model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.lite0", description=main.__doc__)
    parser.add_argument("--photos", type=Path, help="folder of labelled images: NAME_CLASS.jpg")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2], help="seeds of the photos' two halves")
    parser.add_argument("--arms", nargs="*", default=[""], help="beginnings of their names, besides the budget")
    parser.add_argument("--steps", type=int, default=100, help="of finetuning, 25 photos each")
    parser.add_argument("--layers", nargs="*", default=[], help="globs: only these modules are finetuned")
    parser.add_argument("--rate", type=float, help="of finetuning; not given: the default one")
    parser.add_argument("--bytes", type=int, default=BUDGET.target_bytes, help="of the file")
    parser.add_argument("--no-blocks", action="store_true", help="leave out the budget of blocks, and its sizes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    budget = replace(BUDGET, target_bytes=options.bytes)
    training = bgd.FinetuningConfig(
        steps=options.steps, learning_rate=options.rate, mixing=True, layers=tuple(options.layers)
    )
    found: dict[str, list[dict[str, float]]] = {}

    def add(name: str, row: dict[str, float]) -> None:
        found.setdefault(name, []).append(row)
        figures = f"top-1 {row['top1']:.1f}, KL {row['kl']:.3f}, {row['cpu_seconds']:.0f} CPU-s"
        print(f"  {name}: {row['bytes']:,.0f} bytes, {figures}", flush=True)

    for split in options.splits:
        subject = lite0(argparse.Namespace(photos=options.photos, split=split))
        print(f"split {split}: {subject.images}", flush=True)
        add(
            "float", {"bytes": state_bytes(subject.model.state_dict()), "cpu_seconds": 0} | subject.judge(subject.model)
        )
        configs = stages(training, budget)
        if not options.no_blocks:
            report, row = compress(subject, budget)
            add("budget", row)
            names = [layer.name for layer in bgd.plan(subject.model).layers]
            configs = arms(report, names, training, budget)
        for name, config in configs.items():
            if name.startswith(tuple(options.arms)):
                add(name, compress(subject, config)[1])
    print(table(["settings", "file", "top-1", "KL to float", "agrees", "CPU-s"], [_line(*x) for x in found.items()]))


def _line(name: str, rows: Sequence[dict[str, float]]) -> list[str]:
    """One line for all splits."""

    def each(field: str, digits: int) -> str:
        return " / ".join(f"{row[field]:.{digits}f}" for row in rows)

    seconds = statistics.median(row["cpu_seconds"] for row in rows)
    return [name, mib(rows[0]["bytes"]), each("top1", 1), each("kl", 3), each("agreement", 1), f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
