"""The command line as a whole: its help, and what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bgd_plugin as bgd
from bgd_plugin.cli.app import app
from tests.cli.common import RUNNER

pytest.importorskip("PIL", reason="Pillow is not installed")


def test_help_names_the_commands() -> None:
    done = RUNNER.invoke(app, ["--help"])
    assert done.exit_code == 0
    for command in ("plan", "quantize", "inspect", "evaluate", "demo"):
        assert command in done.stdout


def test_help_imports_no_framework() -> None:
    code = (
        "import sys\nfrom bgd_plugin.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torchvision', 'PIL', 'timm', 'transformers', 'matplotlib') if m in sys.modules])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bgd.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
