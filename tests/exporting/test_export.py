"""The call: what it refuses before any work, and that no file is left where the answers differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.errors import BGDError, ConfigError
from bgd_plugin.exporting import targets
from bgd_plugin.exporting.export import export
from bgd_plugin.exporting.result import Exported, Run
from bgd_plugin.nn import PQLinear, quantized


def _network() -> nn.Sequential:
    layer = nn.Linear(12, 8)
    return nn.Sequential(quantized(layer, torch.randn(4, 3), torch.randint(4, (8, 4))), nn.Dropout(0.5))


def _fake(monkeypatch: pytest.MonkeyPatch, *, error: float, modules: tuple[str, ...] = ()) -> list[Path]:
    """A target that writes a file and answers with an error; returns where files were written."""
    written: list[Path] = []

    def write(model: nn.Module, path: Path, examples: Any, dynamic: Any) -> tuple[str, ...]:
        path.write_bytes(b"123")
        written.append(path)
        outputs[:] = examples.answers(model)
        return ("a note",)

    def run(path: Path, inputs: Any) -> Run:
        return Run(outputs=tuple(output + error for output in outputs), is_folded=False, runtime="fake 1")

    outputs: list[Any] = []
    target = targets.Target(name="Fake", extra="fake", modules=modules, write=write, run=run)
    monkeypatch.setitem(targets.TARGETS, ".fake", target)
    return written


def test_the_result_says_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake(monkeypatch, error=0.0)
    done = export(_network(), tmp_path / "net.fake", torch.randn(2, 12))
    assert (tmp_path / "net.fake").read_bytes() == b"123"
    assert (done.size_bytes, done.largest_difference, done.is_folded, done.runtime) == (3, 0.0, False, "fake 1")
    for words in ("3 bytes", "fake 1", "at each run", "a note", "0.0e+00 of the output's range"):
        assert words in str(done)


def test_no_file_is_left_where_the_answers_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = _fake(monkeypatch, error=0.1)
    (tmp_path / "net.fake").write_bytes(b"before")
    with pytest.raises(BGDError, match=r"net\.fake was not written: in fake 1 .* more than the tolerance of 1\.0e-04"):
        export(_network(), tmp_path / "net.fake", torch.randn(2, 12))
    assert written
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]
    assert export(_network(), tmp_path / "net.fake", torch.randn(2, 12), tolerance=1e3).largest_difference


def test_the_network_is_exported_in_evaluation_mode_and_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake(monkeypatch, error=0.0)
    network = _network().train()
    inputs = torch.randn(64, 12)
    export(network, tmp_path / "net.fake", inputs)
    assert all(module.training for module in network.modules())


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = _fake(monkeypatch, error=0.0, modules=("torch", "no_such_runtime"))
    with pytest.raises(BGDError, match=r"needs no_such_runtime: pip install 'bgd-plugin\[fake\]'"):
        export(_network(), tmp_path / "net.fake", torch.randn(2, 12))
    assert not written


class _Wrong(nn.Module):
    def forward(self, x: Any) -> Any:
        return 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"path": "net.h5"}, ConfigError, r"\.onnx \(ONNX\)"),
        ({"path": "net.pte"}, ConfigError, r"ExecuTorch .* bgd_plugin\.materialize"),
        ({"path": "none/net.fake"}, ConfigError, "does not exist: create it first"),
        ({"model": nn.Linear(12, 3)}, BGDError, "no product-quantized layer"),
        ({"model": {}}, ConfigError, "the network is a dict"),
        ({"model": _network().to("meta")}, BGDError, "meta device"),
        ({"model": nn.Sequential(_network(), _Wrong())}, BGDError, "returns no tensor"),
        ({"example_inputs": "photo.jpg"}, ConfigError, "contains no tensor"),
        ({"example_inputs": torch.randn(2, 13)}, BGDError, "fails on the example inputs"),
        ({"example_inputs": torch.tensor(1.0), "dynamic": True}, ConfigError, "not a batch"),
    ],
)
def test_refused_before_any_work(
    change: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = _fake(monkeypatch, error=0.0)
    arguments = {"model": _network(), "path": "net.fake", "example_inputs": torch.randn(2, 12)} | change
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=words):
        export(**arguments)
    assert not written
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_captured_is_refused_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

    class Choosing(PQLinear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) if float(input.sum()) > 0 else super().forward(-input)

    layer = nn.Linear(12, 8)
    network = Choosing(torch.randn(4, 3), torch.randint(4, (8, 4)), layer)
    with pytest.raises(BGDError, match=r"torch\.export cannot capture the network: .*[Dd]ata-dependent"):
        export(network, tmp_path / "net.onnx", torch.randn(2, 12))
    assert not list(tmp_path.iterdir())


def test_the_public_name_hides_no_module() -> None:
    assert callable(bgd.export)
    assert dataclasses.is_dataclass(Exported)
