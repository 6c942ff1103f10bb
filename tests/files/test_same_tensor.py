"""Tensors that share their memory: stored, counted and given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.same_tensor import state_bytes
from tests.networks import em, same_outputs, vectors


class _Views(nn.Module):
    """Buffers and weights that are parts of one memory, and overlap."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 16)
        self.b.bias.data = self.a.bias.data[:]
        table = torch.randn(4, 16)
        self.register_buffer("first", table[0])
        self.register_buffer("rest", table[1:])
        self.register_buffer("table", table)
        self.register_buffer("wide", torch.randn(1, 16).expand(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x)) * self.first
        if self.branches and x.sum() > 1e9:
            x = -x
        return self.b(x + self.rest.sum(0)) + self.table[2] + self.wide[1]  # type: ignore[index,operator]


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
def test_views_of_one_memory_are_stored(branches: bool, tmp_path: Path) -> None:
    model, data = _Views(branches).eval(), vectors()
    result = bgd.quantize(model, data, em(), progress=False)
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=_Views(branches).eval()), data)


def test_memory_is_counted_once() -> None:
    table, wide = torch.zeros(4, 16), torch.zeros(1, 16).expand(8, 16)
    assert state_bytes({"table": table, "again": table, "first": table[0], "wide": wide}) == 4 * 16 * 5
    assert state_bytes({"first": table[0], "last": table[3]}) == 4 * 16 * 2
    meta: dict[str, Any] = {"one": torch.zeros(3, device="meta"), "other": torch.zeros(3, device="meta")}
    assert state_bytes(meta) == 24


class _Grows(nn.Linear):
    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        state[f"{prefix}extra"] = torch.zeros(1)
        super()._load_from_state_dict(state, prefix, *others)


def test_a_network_that_does_not_take_its_state_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), _Grows(16, 16)).eval()
    config = em(overrides=(("2", None),))
    bgd.save(bgd.quantize(model, vectors(), config, progress=False).model, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"(?s)`like` does not take its state: .*2\.extra"):
        bgd.load(tmp_path / "net", like=model)
