"""A folder of images, and a file of a quantized network."""

from __future__ import annotations

from pathlib import Path

import pytest

from bgd_plugin.cli.app import app
from tests.cli.common import NET, RUNNER, SMALL, image


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for i in range(6):
        image(tmp_path / "flat" / f"photo_{i:02d}_{i % 3}.png", i)
    return tmp_path / "flat"


@pytest.fixture
def file(tmp_path: Path, flat: Path) -> Path:
    path = tmp_path / "net.safetensors"
    done = RUNNER.invoke(app, ["quantize", NET, "--calibration", str(flat), "--output", str(path), *SMALL])
    assert done.exit_code == 0, done.output
    return path
