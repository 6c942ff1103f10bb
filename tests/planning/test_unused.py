"""A ratio counts what the network uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bgd_plugin as bgd
from bgd_plugin.errors import ConfigError
from tests.networks import em, vectors


class _Net(nn.Module):
    """A body that is used; `add` gives it more."""

    def __init__(self, add: Callable[[Any], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 32)
        self.register_buffer("table", torch.ones(32))
        self.norm, self.head = nn.BatchNorm1d(32), nn.Linear(32, 8)
        self.extra = nn.ModuleDict()
        add(self)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.b(torch.tanh(self.a(x)))) * torch.cos(self.table)  # type: ignore[arg-type]
        if self.training:
            return self.head(y), [part(y) for part in self.extra.values()]
        return self.head(y)


USED = 4 * (12 * 32 + 32 + 32 * 32 + 32 + 32 + 4 * 32 + 8 * 32 + 8) + 8


def _nothing(net: Any) -> None:
    pass


def _auxiliary(net: Any) -> None:
    net.extra["one"] = nn.Sequential(nn.Linear(32, 640), nn.BatchNorm1d(640))
    net.extra["two"] = nn.Linear(32, 64)


def _tied(net: Any) -> None:
    net.extra["one"] = nn.Linear(32, 32)
    net.extra["one"].weight = net.b.weight
    net.extra["one"].bias = None


def _alias(net: Any) -> None:
    net.extra["one"] = net.b


@pytest.mark.parametrize("add", [_nothing, _auxiliary, _tied, _alias])
def test_parts_that_are_never_used_do_not_count(add: Callable[[Any], None], tmp_path: Path) -> None:
    model = _Net(add).eval()
    plan = bgd.plan(model, em())
    result = bgd.quantize(model, vectors(), em(), progress=False)
    assert plan.original_bytes == result.report.original_bytes == USED
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes
    for notes in (plan.notes, result.report.notes):
        assert any("never used in evaluation mode (extra)" in note for note in notes) == (add is _auxiliary)


def test_weights_that_are_computed_are_used() -> None:
    def normed(net: Any) -> None:
        net.b = parametrizations.weight_norm(net.b)

    model = _Net(normed).eval()
    plan = bgd.plan(model, em())
    assert not any("evaluation" in s.reason for s in plan.skipped)
    assert plan.original_bytes == USED + 4 * 32  # its lengths


def test_a_budget_that_unused_parts_fill_is_refused_with_their_names() -> None:
    with pytest.raises(ConfigError, match=r"cannot be reached: .*never used in evaluation mode \(extra\)"):
        bgd.plan(_Net(_auxiliary).eval(), bgd.BGDConfig(target_ratio=4))
