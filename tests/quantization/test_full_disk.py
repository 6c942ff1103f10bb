"""Runs on a disk that is really full, or read-only; `disk_job` says what is tried there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.disk_job import SCENARIOS

# One worker of pytest-xdist runs them, so that the job runs once.
pytestmark = pytest.mark.xdist_group("disk")

_ALONE = ["unshare", "--map-root-user", "--mount"]


def _failures(folder: Path, step: int) -> dict[str, str]:
    """The traceback of each scenario, empty if it passed: all of them run in one process, with mounts of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here, which gives a process mounts of its own")
    command = [*_ALONE, "mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", str(folder)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this system does not let a process have mounts of its own: {tried.stderr.strip()}")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*_ALONE, sys.executable, "-m", "tests.disk_job", str(folder), str(step)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "adapters")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _failures(tmp_path_factory.mktemp("disk"), step=3)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_a_disk_of_its_own(scenario: str, failures: dict[str, str]) -> None:
    assert not failures[scenario], failures[scenario]


@pytest.mark.slow
def test_with_room_for_any_number_of_pages(tmp_path: Path) -> None:
    failures = _failures(tmp_path, step=1)
    assert not any(failures.values()), failures
