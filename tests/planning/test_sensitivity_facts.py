"""What is known of a layer when its cost is measured: its norm, its bias, and random numbers of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import find_layers, front_end, isolate_weights_, set_modes
from bgd_plugin.planning import sensitivity
from bgd_plugin.support.seeds import seeded
from tests.networks import images, randomized


class _Net(nn.Module):
    """A convolution, a transposed one and a tied layer before a norm; a bias, none, and an attention."""

    def __init__(self, *, is_traceable: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.BatchNorm2d(16))
        self.biased, self.plain = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.twin = nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16))
        self.other = nn.Linear(16, 16, bias=False)
        self.other.weight = self.twin[0].weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.is_traceable = is_traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_traceable and bool(x.sum() > 1e9):
            return x
        x = self.up(torch.tanh(self.conv(x))).mean((2, 3))
        x = self.plain(torch.tanh(self.biased(x)))
        x = self.twin(torch.tanh(self.other(torch.tanh(x))))
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


def _facts(config: BGDConfig, *, is_traceable: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The norm and the bias of each layer that is measured, and the state of its random numbers."""
    real, seen = sensitivity.layer_facts, dict[str, tuple[Any, ...]]()

    def watched(inputs: Any, layer: Any, _: Any, generator: torch.Generator, *, norm: Any, has_bias: bool) -> Any:
        seen[layer.name] = norm, has_bias, generator.get_state()
        return real(inputs, layer, config, generator, norm=norm, has_bias=has_bias)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "layer_facts", watched)
        patch.setattr(sensitivity, "_measured", lambda *_: None)
        model = randomized(_Net(is_traceable=is_traceable))
        network = front_end(model).network
        set_modes(network, {"": False})
        layers = find_layers(network)[0]
        isolate_weights_(network, layers)
        batches = collect_batches(images(2, size=4), model, device=torch.device("cpu"), forward=None)
        measured = sensitivity._along_graph if is_traceable else sensitivity._by_runs
        steps: list[int] = []
        found = measured(network, batches, layers, config, lambda: steps.append(1), "KL")
    assert set(found) == set(seen)
    assert len(steps) == (len(found) if is_traceable else len(layers))
    return seen


@pytest.mark.parametrize("is_traceable", [True, False])
def test_norms_and_biases_are_those_that_a_run_will_correct(
    is_traceable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = _facts(BGDConfig(), is_traceable=is_traceable, monkeypatch=monkeypatch)
    assert {name: norm for name, (norm, _, _) in facts.items() if norm} == {"conv.0": "conv.1"}
    plain = {name: has_bias for name, (_, has_bias, _) in facts.items() if not name.startswith("attention")}
    assert {name for name, has_bias in plain.items() if has_bias} == {"biased"}
    assert len(plain) == 5 and {"conv.0", "up.0", "biased", "plain"} < set(plain)
    # inputs of a projection inside attention are seen where the network runs by itself, and by no node of a graph
    assert any(name.startswith("attention") for name in facts) == (not is_traceable)
    kept = _facts(BGDConfig(batchnorm="keep"), is_traceable=is_traceable, monkeypatch=monkeypatch)
    assert not any(norm for norm, _, _ in kept.values())


@pytest.mark.parametrize("is_traceable", [True, False])
def test_each_layer_draws_its_own_numbers_by_the_seed(is_traceable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _facts(BGDConfig(seed=3), is_traceable=is_traceable, monkeypatch=monkeypatch)
    for name, (_, _, state) in facts.items():
        assert torch.equal(state, seeded(3, name, "sensitivity").get_state()), name
