"""Embeddings are measured for a budget or a bound as other layers are, with a graph and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.graph import find_layers, front_end, isolated_weights
from bgd_plugin.planning.perturbation import perturbed
from bgd_plugin.planning.sensitivity import measure_layers
from tests.calibration.test_rerun import untraceable
from tests.networks import randomized

_WORDS, _WIDTH = 400, 24


class Reader(nn.Module):
    """Two tables of rows, the second of which hardly counts."""

    def __init__(self, *, traces: bool) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Embedding(_WORDS, _WIDTH), nn.Embedding(_WORDS, _WIDTH)
        self.mix, self.head = nn.Linear(_WIDTH, 64), nn.Linear(64, 30)
        self.traces = traces

    def forward(self, words: Tensor) -> Tensor:
        x = self.loud(words) + 0.05 * self.quiet(words)
        if not self.traces:
            untraceable(x)
        logits: Tensor = self.head(torch.tanh(self.mix(x.mean(1))))
        return logits


def _network(*, traces: bool) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = randomized(Reader(traces=traces))
    model.head.weight.data *= 8  # so that its logits tell the samples apart
    return model, [torch.randint(0, _WORDS, (16, 6)) for _ in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("traces", [True, False])
def test_the_loss_is_that_of_the_network_with_other_rows(traces: bool) -> None:
    model, data = _network(traces=traces)
    config = bgd.BGDConfig(embedding=bgd.LayerConfig())
    batches = collect_batches(data, model, device=torch.device("cpu"), forward=None)
    network = front_end(model).network
    layers = find_layers(network)[0]
    steps: list[object] = []
    with isolated_weights(network, layers):
        found = measure_layers(network, batches, layers, config, lambda: steps.append(None))
        assert {"loud", "quiet"} <= set(found) and len(steps) == len(layers)
        few = data[0]  # sixteen samples
        for name in ("loud", "quiet"):
            one = found[name]
            exact = network(few).log_softmax(1)
            with perturbed(network, one.error):
                rough = network(few).log_softmax(1)
            kl = float((exact.exp() * (exact - rough)).sum(1).mean())
            assert one.scale.measure == "KL"
            assert one.loss == pytest.approx(kl, rel=1e-3)
    assert found["loud"].loss > 20 * found["quiet"].loss


@pytest.mark.parametrize("traces", [True, False])
def test_rows_that_hardly_count_take_fewer_bits(traces: bool) -> None:
    model, data = _network(traces=traces)
    config = bgd.BGDConfig(embedding=bgd.LayerConfig(), max_divergence=0.02)
    report = bgd.quantize(model, data, config, progress=False).report
    bits = {layer.name: layer.bits_per_weight for layer in report.layers}
    assert bits["quiet"] < bits.get("loud", 16)
    assert "if only this layer is quantized" in next(layer.note for layer in report.layers if layer.name == "quiet")
