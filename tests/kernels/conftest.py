"""Kernels are on in these tests, and keep their measurements in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bgd_plugin.kernels import choice


@pytest.fixture(autouse=True)
def _own_measurements(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `kernels.json`; nothing that was measured before is known."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BGD_CACHE", str(folder))
    monkeypatch.setattr(choice, "_chosen", {})
    return folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch may use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
