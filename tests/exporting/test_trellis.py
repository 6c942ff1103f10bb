"""Trellis codes in exported files: decoded there, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bgd_plugin as bgd
from bgd_plugin.errors import BGDError
from bgd_plugin.exporting.coreml.write import write as write_coreml
from tests.networks import PlainNet, randomized, vectors

pytestmark = pytest.mark.usefixtures("compiled_search")


def _network() -> Any:
    config = bgd.BGDConfig(linear=bgd.LayerConfig(codes="trellis"), max_divergence=None)
    return bgd.quantize(randomized(PlainNet()).eval(), vectors(), config, progress=False).model


def test_a_program_of_torch_export_gives_the_same_outputs(tmp_path: Path) -> None:
    network, inputs = _network(), vectors()[0]
    bgd.export(network, tmp_path / "net.pt2", inputs)
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(inputs), network(inputs))


def test_onnx_decodes_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = bgd.export(_network(), tmp_path / "net.onnx", vectors()[0])
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5


def test_core_ml_refuses_them_by_name(tmp_path: Path) -> None:
    with pytest.raises(BGDError, match=r"layer '2' has codes of the form 'trellis'.*\.onnx or \.pt2"):
        write_coreml(_network(), tmp_path / "net.mlpackage", None, None)  # type: ignore[arg-type]


def test_the_compiler_takes_them() -> None:
    network, inputs = _network(), vectors()[0]
    torch.testing.assert_close(torch.compile(network, backend="eager")(inputs), network(inputs))
