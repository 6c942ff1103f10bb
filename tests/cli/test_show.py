"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

from bgd_plugin.cli.app import app
from tests.cli.common import RUNNER


def test_inspect_adds_up_to_the_file(file: Path) -> None:
    values = json.loads(RUNNER.invoke(app, ["inspect", str(file), "--json"]).stdout)
    assert sum(values["parts_bytes"].values()) == values["file_bytes"] == file.stat().st_size
    assert [layer["name"] for layer in values["layers"]] == ["conv", "fc"]
    assert values["layers"][0]["weight_shape"] == [16, 8, 3, 3]
    text = RUNNER.invoke(app, ["inspect", str(file)]).stdout
    assert "whole file" in text
    assert "16×8×3×3" in text
