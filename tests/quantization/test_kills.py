"""Runs killed with SIGKILL; the command of the benchmark does it more often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that they do not import torch each time")
def test_a_run_that_is_killed_goes_on_and_ends_in_the_same_bytes() -> None:
    root = Path(__file__).parents[2]
    # a process of its own: one that has trained before may not fork and train
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.kills", "--kills", "2"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "adapters")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each ended in the bytes of the uninterrupted run" in done.stdout
