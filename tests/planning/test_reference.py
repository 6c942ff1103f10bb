"""What the float network answers to a few samples, and at how many tokens."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.graph import copy_module, find_layers, isolate_weights_, trace
from bgd_plugin.planning import reference
from bgd_plugin.planning.extrapolate import loss_and_shifts
from bgd_plugin.planning.outputs import Scale
from bgd_plugin.planning.reference import Reference
from bgd_plugin.planning.sensitivity import measure_sensitivities
from tests.networks import randomized

TOKENS, WIDTH, WORDS = 12, 16, 40


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.head(torch.relu(self.body(x)))}


def _network() -> Language:
    network: Language = randomized(Language())
    network.head.weight.data *= 4
    return network


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [Batch((torch.randn(4, TOKENS, WIDTH, generator=generator),)) for _ in range(2)]


@pytest.mark.parametrize("every", [1, 3])
@torch.no_grad()
def test_the_loss_is_that_at_the_tokens_that_have_logits(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NUMBERS", 8 * TOKENS * WORDS // every)
    network, batches = _network(), _batches()
    exact = Reference.of(network, batches, None)
    assert exact.scale == Scale(measure="KL") and (exact.head is None) == (every == 1)
    whole = [batch.call(network)["logits"][:, ::every] for batch in batches]
    network.body.weight.data *= 1.1
    moved = [batch.call(network)["logits"][:, ::every] for batch in batches]
    walk: Any = SimpleNamespace(student=network, finish=lambda index: batches[index].call(network))
    loss, _, shifts = exact.loss(walk)
    wanted, _, _ = loss_and_shifts(({"logits": m} for m in moved), [{"logits": w} for w in whole], "KL")
    assert loss == pytest.approx(wanted, rel=1e-4) and loss > 1e-3
    assert [a.shape for a, _ in shifts] == [(4 * TOKENS // every, WORDS)] * 2


@torch.no_grad()
def test_outputs_that_are_compared_as_values_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NUMBERS", 8)
    assert Reference.of(_network(), _batches(), "squared difference").head is None


@pytest.mark.parametrize("traced", [True, False])
def test_layers_are_measured_with_logits_of_some_tokens(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "NUMBERS", 8 * TOKENS * WORDS // 4)
    network = trace(copy_module(_network())).eval() if traced else _network().eval()
    layers = [layer for layer in find_layers(network)[0] if layer.name == "body"]
    isolate_weights_(network, layers)
    tokens: Counter[int] = Counter()
    network.get_submodule("head").register_forward_hook(lambda _, __, logits: tokens.update([logits.shape[1]]))
    found = measure_sensitivities(network, _batches(), layers, BGDConfig(max_divergence=None), lambda: None)
    assert set(found) == {"body"} and "KL" in found["body"].reason
    assert tokens[TOKENS // 4] >= 4  # once to try it, and once for the layer
    assert tokens[TOKENS] <= 6
