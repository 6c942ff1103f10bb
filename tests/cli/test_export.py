"""The command `export`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bgd_plugin.cli.app import app
from tests.cli.common import NET, RUNNER, fails


def test_export_writes_a_file_for_another_runtime(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    output = tmp_path / "net.onnx"
    done = RUNNER.invoke(app, ["export", str(file), NET, "--output", str(output), "--shape", "2,3,8,8", "--dynamic"])
    assert done.exit_code == 0, done.output
    assert f"{output}: {output.stat().st_size:,} bytes" in done.stdout
    assert "largest difference" in done.stdout


def test_export_refuses_what_it_does_not_know(tmp_path: Path, file: Path) -> None:
    fails(["export", str(file), NET, "--output", str(tmp_path / "net.xyz"), "--shape", "2,3,8,8"], ".xyz", ".onnx")
    fails(["export", str(file), NET, "--shape", "2,3,x"], "--shape", "1,3,224,224")
