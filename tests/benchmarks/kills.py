"""A run that is killed at random moments, with SIGKILL, ends in the same bytes as one that is not, and leaves nothing.

A process forks for each attempt; the attempt fits, distills and finetunes a small network with a checkpoint folder,
saving after every step, and writes the file. It is killed after a random time, and the next attempt goes on from the
folder. When an attempt comes to its end, its file must hold the bytes of the uninterrupted run, and nothing else may
lie in the folders.

    python -m tests.benchmarks.kills --kills 50
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  # Training imports it, which takes longer than an attempt: once, before the forks.

import bgd_plugin as bgd
import bgd_plugin.support.steps
from tests.networks import SmallResNet, images, randomized

__all__ = ["main"]

CONFIG = bgd.BGDConfig(
    rounds=2,
    distillation=bgd.DistillationConfig(steps=8, batch_size=8, learning_rate=0.01),
    finetuning=bgd.FinetuningConfig(steps=40),
    max_divergence=None,
)
_LAYERS = 4


def _attempt(folder: Path) -> None:
    """The whole run, in this process."""
    bgd_plugin.support.steps.SAVE_SECONDS, bgd_plugin.support.steps._SHARE = 0.0, float("inf")
    model = randomized(SmallResNet())
    result = bgd.quantize(model, images(4), CONFIG, checkpoint=folder / "run", progress=False)
    bgd.save(result.model, folder / "net.safetensors")


def _forked(folder: Path, seconds: float | None) -> bool:
    """Whether an attempt in a process of its own came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _attempt(folder)
            status = 0
        except BaseException as error:  # a child must never return into the parent's code
            print(f"the attempt failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("an attempt failed by itself, see above")
    return True


def _problems(folder: Path, expected: bytes) -> list[str]:
    names = {f"layer-{i:04d}.safetensors" for i in range(_LAYERS)} | {"run.json", "finetuning.steps.safetensors"}
    stray = sorted({p.name for p in (folder / "run").iterdir()} - names)
    stray += sorted({p.name for p in folder.iterdir()} - {"run", "net.safetensors"})
    problems = [f"stray files {', '.join(stray)}"] if stray else []
    same = (folder / "net.safetensors").read_bytes() == expected
    return problems if same else [*problems, "other bytes than the uninterrupted run"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 if every resumed run ended in the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    kills = runs = most = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        start = time.monotonic()
        _forked(whole, None)
        seconds = time.monotonic() - start
        expected = (whole / "net.safetensors").read_bytes()
        while kills < options.kills:
            folder = Path(name) / f"run-{runs}"
            folder.mkdir()
            here = 0
            while not _forked(folder, rng.uniform(0, seconds) if here < 8 else None):
                here += 1
            kills, runs, most = kills + here, runs + 1, max(most, here)
            if problems := _problems(folder, expected):
                print(f"run {runs}, killed {here} times: {'; '.join(problems)}")
                return 1
    print(
        f"{kills} kills in {runs} runs of {seconds:.1f} s (up to {most} in one): "
        "each ended in the bytes of the uninterrupted run, and left no other file"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
