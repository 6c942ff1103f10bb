"""Accuracy against bytes, this library beside what a user would pick instead: same network, same images.

Run `python -m tests.benchmarks.peers` (`make bench-peers`). Every arm quantizes the same layers, gets the same
calibration images, the same batch-norm step and half precision for the rest, and is charged for every byte of its file.
Rows are kept in a JSON file: a run replaces those of its own arms (`--arms bgd_plugin` takes all whose names begin so)
and leaves the others. `--docs` writes the plot and the table of the page.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bgd_plugin.errors import BGDError
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.support.tables import mib
from tests.benchmarks.peers.arms import ARMS, Arm
from tests.benchmarks.peers.page import FOLDER, merge, plot, plot_one, read, write_page
from tests.benchmarks.peers.subjects import SUBJECTS, Subject


class OutOfTime(Exception):
    """An arm has taken all the CPU time that one may take."""


@contextmanager
def limited(cpu_seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once the process has spent so much CPU time in it."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"stopped after {cpu_seconds / 60:.0f} CPU-minutes")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def row_of(subject: Subject, arm: Arm, cpu_seconds: float) -> dict[str, Any]:
    """Compress and judge; what cannot be done is said in the row, since a peer may be missing or never finish."""
    row: dict[str, Any] = {"network": subject.name, "images": subject.images, "arm": arm.name, "method": arm.method}
    start = time.process_time()
    try:
        with limited(cpu_seconds):
            done = arm.run(subject)
    except ImportError as error:
        return row | {"failed": f"not installed ({error}); the extra `peers` has it"}
    except (OutOfTime, BGDError) as error:  # a budget below the least possible size is one of ours
        return row | {"failed": str(error)}
    seconds = time.process_time() - start
    return row | {"bytes": done.bytes, "cpu_seconds": round(seconds, 1)} | subject.judge(done.model)


def float_row(subject: Subject) -> dict[str, Any]:
    """The network that all others come from, in single precision."""
    size = state_bytes(subject.model.state_dict())
    row = {"network": subject.name, "images": subject.images, "arm": "float", "method": "float", "bytes": size}
    return row | {"cpu_seconds": 0.0} | subject.judge(subject.model)


def chosen(names: Sequence[str]) -> list[Arm]:
    """The arms whose names begin with one of `names`.

    Raises:
        SystemExit: a name that no arm begins with.
    """
    for name in names:
        if not any(arm.startswith(name) for arm in ARMS):
            raise SystemExit(f"no arm begins with {name!r}; there are: {', '.join(ARMS)}")
    return [arm for arm in ARMS.values() if any(arm.name.startswith(name) for name in names)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=main.__doc__)
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--arms", nargs="*", default=[""], help="beginnings of their names; none: only plot and table")
    parser.add_argument("--photos", type=Path, help="folder of labelled images for EfficientNet-Lite0: NAME_CLASS.jpg")
    parser.add_argument("--split", type=int, default=0, help="seed of the photos' two halves")
    parser.add_argument("--data", type=Path, help="folder with the four idx files of Fashion-MNIST")
    parser.add_argument("--cpu-minutes", type=float, default=20, help="that one arm may take for one network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("runs/peers.json"), help="rows of this and earlier runs")
    parser.add_argument("--docs", action="store_true", help="keep the rows with the docs; write plot and table there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = FOLDER / "peers.json" if options.docs else options.json
    path.parent.mkdir(parents=True, exist_ok=True)
    arms = chosen(options.arms)
    for name in options.networks if arms else ():
        subject = SUBJECTS[name](options)
        _keep(path, float_row(subject))
        for arm in arms:
            _keep(path, row_of(subject, arm, 60 * options.cpu_minutes))
    plot(read(path), path.with_suffix(".png"))
    if options.docs:
        write_page(read(path), FOLDER / "peers.md")
        plot_one(read(path), "EfficientNet-Lite0", FOLDER / "lite0.png")


def _keep(path: Path, row: dict[str, Any]) -> None:
    """Write each row as soon as it is there: a run that is stopped loses nothing."""
    path.write_text(json.dumps(merge(read(path), row), indent=1) + "\n", encoding="utf-8")
    figures = row.get("failed") or (
        f"{mib(row['bytes'])}, top-1 {row['top1']:.2f}, agreement {row['agreement']:.2f}, KL {row['kl']:.4f}, "
        f"{row['cpu_seconds']:.0f} CPU-s"
    )
    print(f"{row['network']}, {row['arm']}: {figures}", flush=True)


if __name__ == "__main__":
    main()
