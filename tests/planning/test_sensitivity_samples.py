"""How many samples are looked at before the fit, and which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.graph import copy_module, find_layers, isolate_weights_, trace
from bgd_plugin.planning import sensitivity
from bgd_plugin.planning.sensitivity import measure_sensitivities
from tests.networks import randomized, vectors


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ([4] * 25, range(25)),  # too few samples to leave any out
        ([4] * 63, range(0, 63, 2)),
        ([4] * 125, range(0, 125, 5)),
        ([500] * 3, range(3)),  # too few batches
        ([500] * 40, range(0, 40, 5)),
    ],
)
def test_moments_are_of_batches_all_over_the_data(sizes: list[int], chosen: Any) -> None:
    batches = [Batch((torch.full((size, 1), float(index)),)) for index, size in enumerate(sizes)]
    assert [int(batch.args[0][0]) for batch in sensitivity._spread(batches)] == list(chosen)


@pytest.mark.parametrize("traced", [True, False])
def test_a_plan_runs_the_whole_network_no_more_often_than_moments_need(traced: bool) -> None:
    class Rows(TorchDispatchMode):
        """Counts the rows that go through the first layer."""

        count = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.aten.addmm.default and args[2].shape == (16, 32):
                self.count += len(args[1])
            return operator(*args, **(kwargs or {}))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)))

    model = randomized(Plain())
    batches = [Batch((x,)) for x in vectors(batches=400, batch=1, features=16)]
    graph = trace(copy_module(model)).eval() if traced else copy_module(model).eval()
    layers = [layer for layer in find_layers(graph)[0] if layer.name == "last"]
    isolate_weights_(graph, layers)
    with Rows() as rows:
        found = measure_sensitivities(graph, batches, layers, BGDConfig(max_divergence=None), lambda: None)
    assert set(found) == {"last"} and 100 <= rows.count <= 300


class _Texts(nn.Module):
    """Logits of each token, with what was before it or with all."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.body, self.head, self.is_causal = nn.Linear(8, 8), nn.Linear(8, 5), is_causal

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return {"logits": self.head(x.cumsum(1) if self.is_causal else x.cumsum(1) + x.mean(1, keepdim=True))}


@pytest.mark.parametrize(
    ("is_causal", "count", "expected"),
    [(True, 1, [(1, 64, 8)] * 2), (True, 3, [(1, 64, 8)] * 3), (False, 1, [(1, 70, 8)]), (False, 3, [(1, 70, 8)] * 3)],
)
def test_texts_that_may_end_early_do_and_two_of_them_are_run(is_causal: bool, count: int, expected: Any) -> None:
    batches = [Batch((x,)) for x in torch.randn(5, 1, 70, 8, generator=torch.Generator().manual_seed(0))]
    few = sensitivity._few(randomized(_Texts(is_causal=is_causal)), batches, count)
    assert [tuple(batch.args[0].shape) for batch in few] == expected
