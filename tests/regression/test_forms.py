"""Forms of networks and of calibration data that quantization takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.graph import module_at
from bgd_plugin.nn import PQLinear, PQWeight
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, em, images, randomized, same_outputs, vectors


def _quantize(
    model: nn.Module, data: Any, config: bgd.BGDConfig | None = None, **options: Any
) -> bgd.results.Quantized:
    return bgd.quantize(model, data, config or em(), progress=False, **options)


# --- forms of networks


def test_a_module_that_runs_twice_stays_one() -> None:
    result = _quantize(TwiceNet(), vectors())
    assert [layer.name for layer in result.report.layers] == ["shared", "last"]
    assert isinstance(result.model, TwiceNet)
    assert isinstance(result.model.shared, PQLinear)
    assert result.model.alias is result.model.shared


def _two_names() -> fx.GraphModule:
    """A graph that calls one module by two names."""
    traced = fx.symbolic_trace(TwiceNet())
    traced.add_submodule("alias", traced.shared)
    second = [node for node in traced.graph.nodes if node.target == "shared"][1]
    second.target = "alias"
    traced.recompile()
    return traced


def test_a_module_with_two_names_stays_one_under_both(tmp_path: Path) -> None:
    model = _quantize(_two_names(), vectors()).model
    assert isinstance(model.shared, PQLinear)
    assert model.shared is model.alias
    bgd.save(model, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=_two_names())
    assert loaded.shared is loaded.alias
    assert same_outputs(model, loaded, vectors())
    dense = bgd.materialize(model)
    assert type(dense.shared) is nn.Linear
    assert dense.shared is dense.alias


def test_a_module_that_runs_twice_is_fitted_to_both_its_inputs() -> None:
    model = TwiceNet()
    result = _quantize(model, vectors(), em(overrides=(("last", None),)))
    with torch.no_grad():
        weight, bias = model.shared.weight.double(), model.shared.bias.double()
        lost = weight - result.model.shared.weight.double()
        first = torch.cat([torch.tanh(model.first(batch)) for batch in vectors()]).double()
        rows = torch.cat([first, torch.tanh(first @ weight.T + bias)])
        expected = float((rows @ lost.T).square().sum() / (rows @ weight.T).square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-5)


def test_functional_weights_become_modules_that_return_them() -> None:
    model = FunctionalNet()
    result = _quantize(model, images(size=12))
    assert [layer.name for layer in result.report.layers] == ["own", "kernel", "matrix"]
    assert all(isinstance(module_at(result.model, p), PQWeight) for p in ("own.weight", "kernel", "matrix"))


def test_functional_layers_compute_with_the_decoded_weight() -> None:
    model, data = FunctionalNet(), images(size=12)
    result = _quantize(model, data).model
    for path in ("own.weight", "kernel", "matrix"):
        model.get_parameter(path).data = module_at(result, path).weight.detach().clone()
    assert same_outputs(model, result, data)


def test_a_traced_network_goes_in() -> None:
    model = randomized(SmallResNet())
    traced = fx.symbolic_trace(model)
    one, other = _quantize(model, images()).model, _quantize(traced, images()).model
    assert same_outputs(one, other, images())


def test_a_network_traced_with_an_input_that_has_a_default_goes_in() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = PlainNet()

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.net(x * scale)

    model = Scaled()
    result = _quantize(model, vectors()).model
    assert torch.equal(result(vectors()[0]), result(vectors()[0], 2.0))
    assert not torch.equal(result(vectors()[0]), result(vectors()[0], 1.0))


def test_a_second_pass_quantizes_what_the_first_left_and_keeps_what_it_did() -> None:
    first = _quantize(randomized(SmallResNet()), images(), em(overrides=(("fc", None),))).model
    second = _quantize(first, images())
    assert [layer.name for layer in second.report.layers] == ["fc"]
    assert {s.name: s.reason for s in second.report.skipped}["conv1"] == "already quantized"
    assert torch.equal(second.model.conv1.codes, first.conv1.codes)


def test_a_second_pass_takes_no_later_layer_for_the_first() -> None:
    config = em(overrides=(("0", LayerConfig(block_size=4)), ("4", None)))
    first = _quantize(PlainNet(), vectors(), config).model
    assert [layer.name for layer in _quantize(first, vectors()).report.layers] == ["4"]


def test_a_second_pass_over_functional_layers_keeps_them() -> None:
    first = _quantize(FunctionalNet(), images(size=12), em(overrides=(("matrix", None),))).model
    second = _quantize(first, images(size=12))
    assert [layer.name for layer in second.report.layers] == ["matrix"]
    assert torch.equal(module_at(second.model, "kernel").codes, module_at(first, "kernel").codes)


def test_a_second_pass_with_nothing_left_says_so() -> None:
    first = _quantize(randomized(SmallResNet()), images(), em(first_layer=LayerConfig(block_size=9))).model
    with pytest.raises(
        bgd.errors.ConfigError, match=r"no layer of the network can be quantized: .*: already quantized"
    ):
        _quantize(first, images())


def test_the_only_layer_may_be_the_first_one() -> None:
    result = _quantize(nn.Sequential(nn.Linear(12, 16)), vectors(), em(first_layer=LayerConfig(block_size=4)))
    assert result.report.layers[0].name == "0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_follow_the_model(dtype: torch.dtype) -> None:
    data = [batch.to(dtype) for batch in images()]
    model = randomized(SmallResNet()).to(dtype)
    result = _quantize(model, data, em(batchnorm="matched"))
    floats = {p.dtype for p in result.model.parameters()} | {result.model.bn2.running_mean.dtype}
    assert floats == {dtype}
    assert result.model(data[0]).dtype == dtype
    assert bool(torch.isfinite(result.model(data[0])).all())


# --- forms of calibration data


class TwoInputs(nn.Module):
    """Takes two inputs and has no batch of the plain forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(left) + self.b(right)))


@pytest.mark.parametrize("wrap", [lambda x: (x, torch.zeros(8)), lambda x: [x, "label"], lambda x: {"input": x}])
def test_batches_may_carry_labels_or_be_keywords(wrap: Callable[[Tensor], Any]) -> None:
    model = PlainNet()
    expected = _quantize(model, vectors()).model
    assert same_outputs(expected, _quantize(model, [wrap(x) for x in vectors()]).model, vectors())


def test_a_mapping_gives_several_inputs() -> None:
    data = [{"right": x, "left": 2 * x} for x in vectors()]
    result = _quantize(TwoInputs(), data)
    assert [layer.name for layer in result.report.layers] == ["b", "head"]


def test_forward_calls_the_network_as_it_likes() -> None:
    model = TwoInputs()
    expected = _quantize(model, [{"left": x, "right": -x} for x in vectors()]).model
    found = _quantize(model, vectors(), forward=lambda net, x: net(x, right=-x)).model
    assert torch.equal(expected(vectors()[0], vectors()[1]), found(vectors()[0], vectors()[1]))


def test_forward_may_look_at_the_networks_attributes() -> None:
    model = TwoInputs()
    model.scale = 3.0
    found = _quantize(model, vectors(), forward=lambda net, x: net(net.scale * x, x)).model
    expected = _quantize(model, [{"left": 3.0 * x, "right": x} for x in vectors()]).model
    assert torch.equal(expected(vectors()[0], vectors()[1]), found(vectors()[0], vectors()[1]))


def test_a_data_loader_goes_in() -> None:
    dataset = torch.utils.data.TensorDataset(torch.cat(vectors()), torch.zeros(24))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8)
    model = PlainNet()
    assert same_outputs(_quantize(model, vectors()).model, _quantize(model, loader).model, vectors())
