"""`.pt2`: the file answers without this library, and holds neither example inputs nor traces of the code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import nn

from bgd_plugin.exporting.export import export
from bgd_plugin.nn import quantized
from tests.networks import vectors

_ALONE = """
import sys, torch
sys.modules["bgd_plugin"] = None
inputs, outputs = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(inputs)
assert torch.equal(found, outputs)
"""


def _network(codebook_size: int = 4) -> nn.Module:
    layer = nn.Linear(12, 8)
    codes = torch.randint(codebook_size, (8, 4))
    return nn.Sequential(quantized(layer, torch.randn(codebook_size, 3), codes), nn.Tanh()).eval()


def test_the_file_answers_without_this_library(tmp_path: Path) -> None:
    network, inputs = _network(), vectors()[0]
    done = export(network, tmp_path / "net.pt2", inputs)
    assert done.largest_difference == 0.0
    assert not done.is_folded
    torch.save((inputs, network(inputs).detach()), tmp_path / "answers.pt")
    command = [sys.executable, "-c", _ALONE, str(done.path), str(tmp_path / "answers.pt")]
    assert subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True).returncode == 0


def test_no_example_input_and_no_source_is_in_the_file(tmp_path: Path) -> None:
    done = export(_network(), tmp_path / "net.pt2", torch.full((4, 12), 0.1234))
    with zipfile.ZipFile(done.path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    assert not any(torch.tensor(0.1234).numpy().tobytes() * 4 in content for content in contents.values())
    assert not any(b".py" in content or b"site-packages" in content for content in contents.values())


def test_any_batch(tmp_path: Path) -> None:
    network, inputs = _network(), vectors()[0]
    export(network, tmp_path / "net.pt2", inputs[:1], dynamic=True)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(loaded(inputs[:5]), network(inputs[:5]))


def test_codes_that_are_small_only_when_packed_are_named(tmp_path: Path) -> None:
    done = export(_network(codebook_size=300), tmp_path / "net.pt2", vectors()[0])
    assert done.notes == ("codes of 1 layers take whole bytes here, 28 bytes more than packed: .onnx packs them",)
