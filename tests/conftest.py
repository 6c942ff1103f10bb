"""What every test relies on: the same random numbers each time, whichever tests ran before it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from bgd_plugin import kernels
from bgd_plugin.fitting import trellis_windows
from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.kernels import viterbi

# A test must not depend on the speed of the machine or on the day it runs.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts at the same global random state and leaves none behind, whichever tests ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests compare bits, so they run on the plain path, in processes that they start, too.

    The kernels have tests of their own, in `tests/kernels`.
    """
    if request.path.parent.name in ("kernels", "jit"):
        yield
        return
    monkeypatch.setenv("BGD_KERNELS", "off")  # read at import, so that this process keeps its own
    with kernels.disabled():
        yield


@pytest.fixture
def compiled_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search through trellis windows is compiled where it can be: the same walks to the bit, 20 times as fast.

    `tests/kernels/test_viterbi.py` compares the two.
    """
    if AVAILABLE:
        monkeypatch.setattr(trellis_windows, "walk_search", lambda: viterbi._compiled_walk)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch may use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
