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
from bgd_plugin.planning import samples, sensitivity
from bgd_plugin.planning.sensitivity import measure_sensitivities
from tests.networks import randomized, vectors


@pytest.mark.parametrize(
    ("sizes", "tokens", "chosen"),
    [
        ([4] * 25, 1, range(25)),  # too few samples to leave any out
        ([4] * 63, 1, range(0, 63, 3)),
        ([4] * 125, 1, range(0, 125, 7)),
        ([500] * 3, 1, range(3)),  # too few batches
        ([500] * 40, 1, range(0, 40, 5)),
        ([1] * 28, 512, range(0, 28, 3)),  # texts, of which eight have tokens enough
        ([1] * 28, 100, range(28)),
        ([1] * 90, 100, range(0, 90, 2)),
        ([1] * 28, 10**6, range(0, 28, 3)),
        ([4] * 125, 30, range(0, 125, 7)),  # 64 samples will do
    ],
)
def test_moments_are_of_batches_all_over_the_data(sizes: list[int], tokens: int, chosen: Any) -> None:
    batches = [Batch((torch.full((size, 1), float(index)),)) for index, size in enumerate(sizes)]
    assert [int(batch.args[0][0]) for batch in samples.spread(batches, tokens)] == list(chosen)


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
    assert set(found) == {"last"} and 64 <= rows.count <= 200


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
    few, tokens = samples.few_samples(randomized(_Texts(is_causal=is_causal)), batches, count)
    assert tokens == (70 if is_causal else 1)
    assert [tuple(batch.args[0].shape) for batch in few] == expected


@pytest.mark.parametrize("is_traceable", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_moments_are_of_as_many_texts_as_have_tokens_enough(
    is_traceable: bool, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    real = sensitivity.spread
    monkeypatch.setattr(sensitivity, "spread", lambda batches, tokens: (given.append(tokens), real(batches, tokens))[1])
    network = randomized(_Texts(is_causal=is_causal))
    network = trace(copy_module(network)).eval() if is_traceable else network.eval()
    batches = [Batch((x,)) for x in torch.randn(5, 1, 70, 8, generator=torch.Generator().manual_seed(0))]
    layers = find_layers(network)[0]
    isolate_weights_(network, layers)
    found = measure_sensitivities(network, batches, layers, BGDConfig(max_divergence=None), lambda: None)
    assert set(found) == {"body", "head"} and set(given) == {70 if is_causal else 1}
