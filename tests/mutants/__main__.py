"""`make mutants`: which small defects in the method's folders the fast tests do not notice.

Mutants come from cosmic-ray's operators and those of `wires.py`. Each is put in a copy of the sources, and the tests
that run its line are run there, in a process forked from one that has torch in memory: some seconds for each mutant.

    make mutants MUTANTS_ARGS="--count 40 --seed 2 fitting planning"
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.mutants.coverage_of import Tests, measured
from tests.mutants.sites import Mutant, sampled

FOLDERS = ("fitting", "quantization", "planning", "correction", "calibration")
# Not those that start processes, nor those that measure memory: seconds each, and hardly a line of their own.
_SLOW = ("processes", "memory", "kills", "full_disk", "numerics")
_LEFT_OUT = (
    *(f"--ignore=tests/quantization/test_{name}.py" for name in _SLOW),
    "--deselect=tests/calibration/test_store.py::test_the_measured_peak_stays_within_the_bound",
)
ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "mutants"


def main() -> None:
    """Sample mutants, run their tests, and say which survive."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS, help="of bgd_plugin; all five if not given")
    parser.add_argument("--count", type=int, default=20, help="mutants of each folder; 0: every one")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=30, help="of tests for each mutant, the nearest ones first")
    parser.add_argument("--operators", default="", help="only those whose name begins so: wires, core")
    parser.add_argument("--keep", action="store_true", help="the measured coverage, although files have changed since")
    parser.add_argument(
        "--tests", nargs="*", help="files and folders of tests to choose from; the folders' own if not given"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    copy = _copied()
    try:
        _report(options.folders, _outcomes(copy, options))
    finally:
        shutil.rmtree(copy)


def _outcomes(copy: Path, options: argparse.Namespace) -> Counter[tuple[str, str]]:
    """How many mutants of each folder were killed, survived, or are known to compute the same."""
    known = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text())["mutant"]
    mutants = sampled(copy, options.folders, options.count, options.seed, options.operators)
    tests = _in_a_fork_of_its_own(copy, options)
    outcomes: Counter[tuple[str, str]] = Counter()
    start = time.monotonic()
    random.Random(options.seed).shuffle(mutants)
    for number, mutant in enumerate(mutants, start=1):
        outcome = "equivalent" if _is_known(mutant, known) else _tested(copy, mutant, tests, options.seconds)
        outcomes[mutant.path.split("/")[1], outcome] += 1
        if outcome in ("survived", "not run"):
            print(f"{outcome}: {mutant.path}:{mutant.line} {mutant.operator}\n  - {mutant.before}\n  + {mutant.after}")
        print(f"[{number}/{len(mutants)}, {time.monotonic() - start:.0f} s]", end="\r", flush=True)
    return outcomes


def _in_a_fork_of_its_own(copy: Path, options: argparse.Namespace) -> Tests:
    """Measure there, so that this process never imports what is to be mutated.

    What is measured, and mutated later, is a copy: the sources may be edited in the meantime.
    """
    names = [*(options.tests or (f"tests/{folder}" for folder in options.folders)), *_LEFT_OUT]
    kept = BUILD / f"tests-{hashlib.sha256(repr((options.folders, names)).encode()).hexdigest()[:8]}.json"
    child = os.fork()
    if not child:
        _enter(copy)
        try:
            measured(copy, options.folders, names, kept, is_kept=options.keep)
        except SystemExit as failed:
            print(failed)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)
    return measured(copy, options.folders, names, kept, is_kept=True)


def _enter(copy: Path) -> None:
    """Work in a copy from now on, and import from there."""
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "bgd_plugin")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), str(copy / "adapters"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os.environ["PYTHONPATH"] = f"{copy}:{copy / 'adapters'}"
    sys.dont_write_bytecode = True


def _copied() -> Path:
    """A copy of sources and tests, in which the mutants are made."""
    copy = BUILD / f"copy-{os.getpid()}"
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("bgd_plugin", "tests", "adapters", "docs", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def _tested(copy: Path, mutant: Mutant, tests: Tests, seconds: float) -> str:
    file = copy / mutant.path
    source = file.read_text()
    names = tests.of(mutant.path, mutant.line, source, seconds=seconds)
    if not names:
        return "not run"
    limit = 60 + 10 * sum(tests.seconds[name] for name in names)
    file.write_text(mutant.source)
    try:
        return "survived" if _passes(copy, names, limit) else "killed"
    finally:
        file.write_text(source)


def _passes(copy: Path, names: Sequence[str], limit_seconds: float) -> bool:
    """Whether the tests pass in the copy; a run that does not end within the limit has noticed the mutant, too."""
    child = os.fork()
    if not child:
        os.setsid()
        _enter(copy)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-n", "0", *names])))
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _is_known(mutant: Mutant, known: Sequence[dict[str, str]]) -> bool:
    """Whether it is among the mutants that are known to compute the same."""
    return any(
        mutant.path == one["path"] and mutant.before == one["before"] and mutant.after == one["after"] for one in known
    )


def _report(folders: Sequence[str], outcomes: Counter[tuple[str, str]]) -> None:
    print(f"\n{'folder':<14}{'mutants':>8}{'killed':>8}{'survived':>9}{'not run':>8}{'equivalent':>11}{'rate':>8}")
    for folder in (*folders, "all"):
        counts = Counter[str]()
        for (place, outcome), count in outcomes.items():
            counts[outcome] += count if folder in (place, "all") else 0
        judged = counts["killed"] + counts["survived"] + counts["not run"]
        rate = f"{counts['killed'] / judged:.0%}" if judged else "-"
        numbers = f"{counts['killed']:>8}{counts['survived']:>9}{counts['not run']:>8}{counts['equivalent']:>11}"
        print(f"{folder:<14}{sum(counts.values()):>8}{numbers}{rate:>8}")


if __name__ == "__main__":
    main()
