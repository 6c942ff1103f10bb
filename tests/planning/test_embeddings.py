"""Embeddings are measured for a budget or a bound as other layers are, with a graph and without."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import collect_batches
from bgd_plugin.files.rounding import as_stored
from bgd_plugin.graph import find_layers, front_end, isolated_weights
from bgd_plugin.planning.perturbation import perturbed
from bgd_plugin.planning.sensitivity import measure_layers
from tests.calibration.test_rerun import untraceable
from tests.networks import randomized

# One worker of pytest-xdist runs them, so that networks are quantized once.
pytestmark = pytest.mark.xdist_group("embeddings")

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


@functools.cache
def _report(traces: bool, **fields: Any) -> bgd.results.Report:
    """Of the network within a bound; several tests look at it."""
    model, data = _network(traces=traces)
    return bgd.quantize(model, data, bgd.BGDConfig(max_divergence=0.02, **fields), progress=False).report


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
    report = _report(traces, embedding=bgd.LayerConfig())
    bits = {layer.name: layer.bits_per_weight for layer in report.layers}
    assert bits["quiet"] < bits.get("loud", 16)
    assert "if only this layer is quantized" in next(layer.note for layer in report.layers if layer.name == "quiet")


@pytest.mark.parametrize("traces", [True, False])
def test_without_a_setting_a_table_takes_what_the_bound_leaves_it(traces: bool) -> None:
    """As with open sizes, and in a smaller file than with rows of 8 bits."""
    report, asked = _report(traces), _report(traces, embedding=bgd.LayerConfig())
    assert report.layers == asked.layers and report.compressed_bytes == asked.compressed_bytes
    float_ = _report(traces, embedding=None)
    assert report.compressed_bytes < float_.compressed_bytes


def test_without_data_or_with_fixed_sizes_tables_stay_float() -> None:
    model, data = _network(traces=True)
    for plan in (bgd.plan(model), bgd.plan(model, bgd.BGDConfig(max_divergence=None), data, progress=False)):
        assert {"loud", "quiet"} <= {skipped.name for skipped in plan.skipped}
    fixed = bgd.quantize(model, data, bgd.BGDConfig(max_divergence=None), progress=False)
    assert {layer.name for layer in fixed.report.layers} == {"mix", "head"}


@pytest.mark.parametrize("traces", [True, False])
def test_rows_of_8_bits_are_one_choice(traces: bool, tmp_path: Path) -> None:
    """A row that is much larger than all others spoils a codebook, but not a scale for each row."""
    model, data = _network(traces=traces)
    with torch.no_grad():
        model.loud.weight[-1] *= 1000
    data = [words.clamp(max=_WORDS - 2) for words in data]
    config = bgd.BGDConfig(max_divergence=1e-3)
    result = bgd.quantize(model, data, config, progress=False)
    reasons = {skipped.name: skipped.reason for skipped in result.report.skipped}
    narrow = [name for name in ("loud", "quiet") if "8 bits" in reasons.get(name, "")]
    assert narrow
    for name in narrow:
        table = result.model.get_submodule(name).weight
        assert torch.equal(table, as_stored(model.get_submodule(name).weight.detach(), "int8"))
    bgd.save(result.model, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size == result.report.compressed_bytes


@torch.no_grad()
def test_a_weight_that_layers_share_is_changed_in_all_of_them() -> None:
    torch.manual_seed(0)
    twice = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    twice[2].weight = twice[0].weight
    network = front_end(twice).network
    layers = find_layers(network)[0]
    (shared,) = (layer for layer in layers if layer.tied)
    data = [torch.randn(32, 64)]
    batches = collect_batches(data, twice, device=torch.device("cpu"), forward=None)
    with isolated_weights(network, layers):
        found = measure_layers(network, batches, layers, bgd.BGDConfig(), lambda: None)
        with perturbed(network, found[shared.name].error, 2.0):
            answer = network(data[0])
    rough = found[shared.name].error.weight(2.0)
    by_hand = torch.tanh(data[0] @ rough.T + twice[0].bias) @ rough.T + twice[2].bias
    shift = (answer - by_hand).mean(0)  # the bias of the first use takes up its mean error
    assert float((answer - by_hand - shift).square().mean()) < 0.05 * float((answer - twice(data[0])).square().mean())
