"""Layers whose weight is read by name: found, fitted to their inputs, saved, loaded, and made dense again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin.graph import find_layers
from bgd_plugin.graph.bare import multiplies_by_columns
from bgd_plugin.pq.layout import Layout
from tests.networks import randomized, same_outputs, vectors

WIDTH = 16
EVERYTHING = bgd.BGDConfig(
    first_layer=bgd.LayerConfig(block_size=4),
    overrides=(("stem", None), ("head", None)),  # so that each sample goes to the expert that it went to
    max_divergence=None,
)


class Columns(nn.Module):
    """A linear layer with its weight the other way round, as transformers' Conv1D."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return y.reshape(*x.shape[:-1], -1)


class Scaled(Columns):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Experts(nn.Module):
    """As transformers' experts: all in one tensor, and each token goes to one of them; the last one gets none."""

    def __init__(self, *, turned: bool = False, how: str = "loop") -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.how = 4, turned, how
        shape = (4, WIDTH, 3 * WIDTH) if turned else (4, 3 * WIDTH, WIDTH)
        self.up = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        weights = self.up if self.is_transposed else self.up.mT
        if self.how == "gathered":
            return torch.bmm(x[:, None], weights[chosen])[:, 0]
        if self.how == "grouped":
            order = chosen.argsort()
            ends = torch.stack([(chosen <= e).sum() for e in range(4)]).int()
            return functional.grouped_mm(x[order], weights, offs=ends)[order.argsort()]
        result = x.new_zeros(len(x), 3 * WIDTH)
        for expert in chosen.unique().tolist():
            result[chosen == expert] = x[chosen == expert] @ weights[expert]
        return result


class Around(nn.Module):
    """A layer between two ordinary ones, in a network that traces or does not."""

    def __init__(self, layer: nn.Module, width: int, *, traces: bool) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(width, 5)
        self.traces, self.several = traces, isinstance(layer, (nn.RNNBase, nn.LSTMCell))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if not self.traces and float(x.detach().sum()) > 1e9:
            x = -x
        y = self.layer(x)
        return self.head(y[0] if self.several else y)


class Reads(nn.Module):
    """A layer that is never called: its weight is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.other.weight, self.other.bias)


CASES: dict[str, Any] = {
    "columns": (lambda: Columns(WIDTH, 3 * WIDTH), ["layer"]),
    "columns, no bias": (lambda: Columns(WIDTH, 3 * WIDTH, bias=False), ["layer"]),
    "experts": (Experts, ["layer.up"]),
    "experts, gathered": (lambda: Experts(how="gathered"), ["layer.up"]),
    "experts, grouped": (lambda: Experts(how="grouped"), ["layer.up"]),
    "experts, turned": (lambda: Experts(turned=True), ["layer.up"]),
    "LSTM": (lambda: nn.LSTM(WIDTH, 3 * WIDTH), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "GRU": (lambda: nn.GRU(WIDTH, 3 * WIDTH), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "cell": (lambda: nn.LSTMCell(WIDTH, 3 * WIDTH), ["layer.weight_ih", "layer.weight_hh"]),
    "read directly": (Reads, ["layer.other"]),
}


def build(case: str, *, traces: bool) -> nn.Module:
    network: nn.Module = Around(CASES[case][0](), 3 * WIDTH, traces=traces)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return network.eval()


def data() -> list[Tensor]:
    return vectors(features=WIDTH, batch=40, batches=4)


@pytest.mark.parametrize("traces", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_weights_that_are_read_by_name_are_quantized(case: str, traces: bool, tmp_path: Path) -> None:
    network = build(case, traces=traces)
    result = bgd.quantize(network, data(), EVERYTHING, progress=False)
    found = {layer.name: layer.relative_error for layer in result.report.layers}
    assert set(CASES[case][1]) <= set(found)
    assert all(found[name] < 0.3 for name in CASES[case][1])
    names = {name for name, _ in result.model.named_parameters()}
    assert not any(name.startswith("layer") and "codebook" not in name and "bias" not in name for name in names)
    assert bgd.save(result.model, tmp_path / "n") == result.report.compressed_bytes
    again = bgd.load(tmp_path / "n", like=network)
    copied, pickled = copy.deepcopy(result.model), pickle.loads(pickle.dumps(again)) if not traces else again
    for other in (again, copied, pickled):
        assert same_outputs(result.model, other, data())
    dense = bgd.materialize(result.model)
    with torch.no_grad():
        for batch in data():
            torch.testing.assert_close(dense(batch), result.model(batch), atol=1e-4, rtol=1e-4)
            assert (result.model(batch) - network(batch)).norm() < 0.6 * network(batch).norm()
    shapes = {name: p.shape for name, p in network.named_parameters()}
    assert {name: p.shape for name, p in dense.named_parameters()} == shapes


def test_inputs_count_in_the_fit() -> None:
    """The fit to an LSTM's states and to experts' tokens is better there than one to the weights alone."""
    for case in ("LSTM", "experts", "columns"):
        network = build(case, traces=False)
        errors = []
        for result in (
            bgd.quantize(network, data(), EVERYTHING, progress=False),
            bgd.quantize_weights(network, EVERYTHING),
        ):
            with torch.no_grad():
                errors.append(sum(float((result.model(x) - network(x)).square().mean()) for x in data()))
        assert errors[0] < errors[1]


def test_what_multiplies_in_another_way_is_none() -> None:
    assert multiplies_by_columns(randomized(Columns(6, 9)))
    assert multiplies_by_columns(Columns(6, 6, bias=False))
    with torch.device("meta"):
        assert multiplies_by_columns(Columns(6, 9))
    assert not multiplies_by_columns(randomized(Scaled(6, 9)))
    changed = randomized(Columns(6, 9))
    changed.forward = lambda x: x
    assert not multiplies_by_columns(changed)
    assert not multiplies_by_columns(nn.LayerNorm((6, 9)))


def test_weights_that_two_modules_read_by_name_stay_float() -> None:
    network = nn.Sequential(Columns(WIDTH, WIDTH), nn.Tanh(), Columns(WIDTH, WIDTH), nn.Linear(WIDTH, 8))
    network[2].weight = network[0].weight
    found, left = find_layers(network)
    assert [layer.name for layer in found] == ["3"]
    assert any("also used by" in layer.reason for layer in left)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 8), Layout()),
        ((8, 6), Layout(transposed=True)),
        ((3, 6, 8), Layout(columns=8)),
        ((3, 8, 6), Layout(transposed=True, columns=8)),
        ((4, 48), Layout(columns=8)),
    ],
)
def test_a_layout_undoes_itself(shape: tuple[int, ...], layout: Layout) -> None:
    weight = torch.randn(shape)
    matrix = layout.matrix(weight)
    assert matrix.shape[1] == 8
    assert torch.equal(layout.weight(matrix, shape), weight)


class Mixing(nn.Module):
    """A conditional convolution, as timm's: its kernel is a mix of four, by weights that each sample brings."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size, self.num_experts = 16, 24, (3, 3), 4
        self.weight = nn.Parameter(torch.randn(4, 24 * 16 * 9) / 12)
        self.bias = nn.Parameter(torch.randn(4, 24))

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        kernels = (routing @ self.weight).view(-1, 16, 3, 3)
        y = functional.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(x))
        return y.view(len(x), 24, *y.shape[2:]) + (routing @ self.bias)[:, :, None, None]


class Conditional(nn.Module):
    def __init__(self, *, traces: bool) -> None:
        super().__init__()
        self.stem, self.routing, self.mix, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4), Mixing(), nn.Linear(24, 8)
        self.traces = traces

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if not self.traces and float(x.detach().sum()) < 0:
            x = -x
        return self.head(self.mix(x, torch.sigmoid(self.routing(x.mean((2, 3))))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("traces", [True, False])
def test_kernels_that_each_sample_mixes_are_quantized_by_their_weights(traces: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Conditional(traces=traces).eval()
    batches = [torch.randn(4, 3, 10, 10) for _ in range(3)]
    result = bgd.quantize(network, batches, bgd.BGDConfig(max_divergence=None, seed=1), progress=False)
    assert {"mix", "routing", "head"} == {layer.name for layer in result.report.layers}
    assert ("mix.bias", "Mixing has no product-quantized form") in [(x.name, x.reason) for x in result.report.skipped]
    mixed = next(layer for layer in result.report.layers if layer.name == "mix")
    assert mixed.relative_error < 0.3  # of the weight: nothing is known of each kernel's inputs
    with torch.no_grad():
        wanted, found = network(batches[0]), result.model(batches[0])
    assert (found - wanted).norm() < 0.3 * wanted.norm()
    bgd.save(result.model, tmp_path / "net")
    assert torch.equal(bgd.load(tmp_path / "net", like=Conditional(traces=traces).eval())(batches[0]), found)
