"""Core ML: the package is built and read back on any system; its tables are the network's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.errors import BGDError, ConfigError
from bgd_plugin.exporting.coreml import write as coreml
from bgd_plugin.exporting.export import export
from bgd_plugin.nn import FrozenNorm, quantized

pytest.importorskip("coremltools", reason="the extra coreml is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # coremltools has many things to say of versions


def _layer(layer: Any, block_size: int, codebook_size: int, storage: Any = "int8") -> Any:
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    codes = torch.randint(codebook_size, (rows, columns // block_size))
    result = quantized(layer, torch.randn(codebook_size, block_size) * 0.1, codes)
    result.round_codebook_(storage)
    return result


class Net(nn.Module):
    """A 3x3 convolution, a 1x1 convolution, and a linear layer, with three widths of indices."""

    def __init__(self, codebook_size: int = 8, storage: str = "int8") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = FrozenNorm(torch.rand(16), torch.rand(16))
        self.wide = _layer(nn.Conv2d(16, 16, 3, padding=1), 9, 16, storage)
        self.point = _layer(nn.Conv2d(16, 32, 1), 4, 64, storage)
        self.last = _layer(nn.Linear(32, 10), 4, codebook_size, storage)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.norm(self.stem(x)))))
        return self.last(torch.relu(self.point(x)).mean((2, 3)))


def test_the_package_is_written_and_read_back(tmp_path: Path) -> None:
    inputs = torch.randn(1, 3, 8, 8)
    for _ in range(2):  # the second takes the place of the first
        done = export(Net().eval(), tmp_path / "net.mlpackage", inputs)
    files = [file.stat().st_size for file in done.path.rglob("*") if file.is_file()]
    assert done.size_bytes == sum(files)
    assert done.largest_difference is None
    assert "3 tables" in done.notes[0]
    assert done.notes[1].endswith(": wide")
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.mlpackage"]


@pytest.mark.slow
def test_tables_that_half_precision_holds_are_exact(tmp_path: Path) -> None:
    done = export(Net(storage="float16").eval(), tmp_path / "net.mlpackage", torch.randn(1, 3, 8, 8))
    assert "largest difference 0.0e+00" in done.notes[0]


def test_what_has_no_table_is_named(tmp_path: Path) -> None:
    done = export(Net(codebook_size=512).eval(), tmp_path / "net.mlpackage", torch.randn(1, 3, 8, 8))
    assert "2 tables" in done.notes[0]
    assert done.notes[-1].endswith(": last")


@pytest.mark.slow
def test_a_table_that_is_not_the_weight_leaves_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(coreml, "read_back", lambda *_: 0.01)
    with pytest.raises(BGDError, match=r"differ by 1\.0e-02"):
        export(Net().eval(), tmp_path / "net.mlpackage", torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_free_dimensions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fixed shapes"):
        export(Net().eval(), tmp_path / "net.mlpackage", torch.randn(2, 3, 8, 8), dynamic=True)
