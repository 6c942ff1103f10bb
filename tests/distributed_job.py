"""What each process of a test's job runs: quantize with its part of the batches, and write what came out.

`python -m tests.distributed_job`, started by torchrun, or `main` with the same variables in the environment.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._dynamo  # Training imports it, which takes longer than a job: once, before the forks.
import torch.distributed as dist
from torch import Tensor, nn

import bgd_plugin as bgd
import bgd_plugin.support.steps
from tests.networks import SmallResNet, images, randomized, vectors

# Several processes keep other samples aside than one: where they are compared with it, all data is fitted to.
CONFIGS: dict[str, bgd.BGDConfig] = {
    "default": bgd.BGDConfig(max_divergence=None),
    "full": bgd.BGDConfig(reconstruction=None, kept_aside=0.0, max_divergence=None),
    "em": bgd.BGDConfig.paper("small", batchnorm="matched", distillation=None, finetuning=None, kept_aside=0.0),
    "untraced": bgd.BGDConfig(kept_aside=0.0, max_divergence=None),
    "branching": bgd.BGDConfig(kept_aside=0.0, max_divergence=None),
    "budget": bgd.BGDConfig(target_bytes=6_000),
    "finetuned": bgd.BGDConfig(
        method="em",
        kept_aside=0.0,
        linear=bgd.LayerConfig(block_size=1, codebook_size=512),  # codes wider than a byte
        overrides=(("4", bgd.LayerConfig(block_size=1, codebook_size=16)),),
        codebook_storage="float16",
        finetuning=bgd.FinetuningConfig(
            epochs=3, trained="codebooks", learning_rate=10.0
        ),  # the network is nearly exact as it is
        max_divergence=None,
    ),
    "trained": bgd.BGDConfig(
        distillation=bgd.DistillationConfig(steps=3, batch_size=16),
        finetuning=bgd.FinetuningConfig(epochs=3),
        max_divergence=None,
    ),
}


def network(config: str, seed: int = 0) -> nn.Module:
    """The network of a setting: the same in every process."""
    torch.manual_seed(seed)
    builds = {"finetuned": _plain, "untraced": Untraced, "branching": Untraced}
    model: nn.Module = randomized(builds.get(config, SmallResNet)())
    return model


class Untraced(nn.Module):
    """Goes another way on large inputs, which nothing but a run can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.a = nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Linear(32, 32, bias=False)
        self.after, self.rare, self.head = nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.a(torch.relu(self.norm(self.stem(x)))))
        if float(x.detach().abs().max()) > 50:
            y = self.rare(y)
        return self.head(torch.relu(y))


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def batches(config: str) -> list[Tensor]:
    """The whole calibration set of a setting."""
    if config == "branching":
        return [batch * (1 if number % 2 else 100) for number, batch in enumerate(vectors(8))]
    return vectors(8) if config in ("finetuned", "untraced") else images(8)


class Deadly(list[Tensor]):
    """Calibration data that is walked as often as told, and then ends the process."""

    def __init__(self, items: list[Tensor], walks: int, how: str, output: Path) -> None:
        super().__init__(items)
        self.walks, self.how, self.output = walks, how, output

    def __iter__(self) -> Iterator[Tensor]:
        """One walk."""
        self.walks -= 1
        if self.walks < 0:
            (self.output / "end").touch()
        if self.walks < 0 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.walks < 0:
            raise OSError("the data is gone")
        return super().__iter__()


def _refused(output: Path, rank: int) -> None:
    """Write down the error that different networks are."""
    try:
        bgd.quantize(network("full", seed=rank), batches("full"), CONFIGS["full"], progress=False)
    except bgd.errors.ConfigError as error:
        (output / f"refused-{rank}").write_text(str(error))


def main(arguments: list[str] | None = None) -> None:
    """One process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--prelude", action="store_true", help="try different networks in the processes first")
    parser.add_argument("--save-each-step", action="store_true", help="in stages of training")
    parser.add_argument("--dies", type=int, help="the process that ends after so many walks over its data")
    parser.add_argument("--walks", type=int, default=0)
    parser.add_argument("--how", choices=["killed", "error"])
    options = parser.parse_args(arguments)
    if options.save_each_step:
        bgd_plugin.support.steps.SAVE_SECONDS, bgd_plugin.support.steps._SHARE = 0.0, float("inf")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        if options.prelude:
            _refused(options.output, rank)
        for config in options.configs:
            model = network(config)
            part = batches(config)[rank::size]
            part = Deadly(part, options.walks, options.how, options.output) if rank == options.dies else part
            result = bgd.quantize(model, part, CONFIGS[config], checkpoint=options.checkpoint, progress=False)
            bgd.save(result.model, options.output / f"{config}-{rank}.safetensors")
            (options.output / f"{config}-{rank}.json").write_text(result.report.to_json())
    except bgd.BGDError as error:
        (options.output / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
