"""What quantization takes beyond the network stays within what docs/memory.md says; `test_store` has the bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory_job import BATCHES, BLOCKS, COLUMNS, LAYERS, TOKENS, WIDTH, WIDTH_OF_BLOCK

_GRAM, _LAYER = 4 * COLUMNS**2 / 2**20, 4 * WIDTH**2 / 2**20
_MODEL = 12 * BLOCKS * 4 * WIDTH_OF_BLOCK**2 / 2**20
_VALUES = 9 * 4 * TOKENS * WIDTH_OF_BLOCK * BATCHES / 2**20  # of a block: what its layers read, and its output
_BLOCK_GRAM = 4 * (4 * WIDTH_OF_BLOCK) ** 2 / 2**20
LIMITS = {
    # two copies, twice the values of one block in both networks, and eight Grams; the values of all eight blocks would
    # be four times as many
    "transformer": 2 * _MODEL + 4 * _VALUES + 8.5 * _BLOCK_GRAM,
    "full": 8.5 * _GRAM,  # eight, and what is small on a wide layer
    "em": (LAYERS + 12) * _LAYER,  # a copy of the network, and twelve layers
    "without data": (LAYERS + 8) * _LAYER,
}


# One worker of pytest-xdist runs them, so that one process is forked for all kinds.
pytestmark = [
    pytest.mark.xdist_group("memory"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak anew"),
]


def _peaks(kinds: list[str]) -> dict[str, float]:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "adapters")])
    # what is freed goes back to the system, as it does by itself where layers are large: else its leavings count, too
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.memory_job", *kinds],
        cwd=root,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {kind: float(peak) for kind, peak in (line.split(": ") for line in run.stdout.splitlines())}


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    return _peaks([kind for kind in LIMITS if kind != "transformer"])


@pytest.mark.parametrize("kind", [kind for kind in LIMITS if kind != "transformer"])
def test_the_peak_beyond_the_network(kind: str, peaks: dict[str, float]) -> None:
    assert 0 < peaks[kind] < LIMITS[kind]


@pytest.mark.slow
def test_the_peak_of_a_transformer_beyond_the_network() -> None:
    assert 0 < _peaks(["transformer"])["transformer"] < LIMITS["transformer"]
