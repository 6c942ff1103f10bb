"""Changes gathered in panels are the changes made one after another."""

from __future__ import annotations

import pytest
import torch

from bgd_plugin.pq import panels
from bgd_plugin.pq.panels import Panels


@pytest.mark.parametrize(
    ("columns", "block_size", "panel"), [(24, 4, 8), (24, 4, 12), (20, 4, 8), (12, 3, 128), (6, 6, 4)]
)
def test_they_are_those_of_one_block_after_another(
    columns: int, block_size: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "_COLUMNS", panel)
    values, matrix = torch.randn(2, 5, columns).double(), torch.randn(2, columns, columns).double()
    plain, seen = values.clone(), []
    gathered = Panels(values.clone(), matrix, block_size)
    for block in range(columns // block_size):
        here = slice(block * block_size, (block + 1) * block_size)
        factor = plain[:, :, here].tanh()
        torch.testing.assert_close(gathered[block], plain[:, :, here])
        gathered.change_(block, gathered[block].tanh())
        plain[:, :, here.stop :] -= factor @ matrix[:, here, here.stop :]
        seen.append(block)
    assert len(seen) == columns // block_size


def test_who_changes_a_panel_from_within_changes_the_columns_beyond_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_COLUMNS", 8)
    values, matrix = torch.randn(2, 5, 20).double(), torch.randn(2, 20, 20).double()
    one, other = Panels(values.clone(), matrix, 4), Panels(values.clone(), matrix, 4)
    for blocks in other.spans():
        own, square = other.part(blocks)
        factors = []
        for place, block in enumerate(range(blocks.start, blocks.stop)):
            here = slice(4 * place, 4 * place + 4)
            torch.testing.assert_close(own[:, :, here], one[block])
            factors.append(own[:, :, here].tanh())
            own[:, :, here.stop :] -= factors[-1] @ square[:, here, here.stop :]
            one.change_(block, one[block].tanh())
        other.change_beyond_(blocks, torch.cat(factors, 2))
