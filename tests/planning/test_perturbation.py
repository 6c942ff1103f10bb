"""One layer with an error: its output keeps what the corrections of a run keep, and afterwards all is as before."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.graph import copy_module, find_layers, isolate_weights_, trace
from bgd_plugin.planning.layer_facts import LayerFacts, layer_facts
from bgd_plugin.planning.perturbation import Perturbation, bias_of, perturbed
from bgd_plugin.pq.blocks import Geometry
from tests.networks import FunctionalNet, randomized

_X = torch.randn(400, 12, generator=torch.Generator().manual_seed(3)) + 1


def _network(kind: str) -> Any:
    """Layer "0", and behind it a norm or nothing."""
    layer = nn.Linear(12, 8, bias=kind == "bias")
    return trace(randomized(nn.Sequential(layer, nn.BatchNorm1d(8) if kind == "norm" else nn.Identity())))


def _error(network: Any, kind: str) -> tuple[LayerFacts, Perturbation]:
    """The error of a weight that is off by a tenth."""
    (layer,), _ = find_layers(network)
    calls = [[(_X, Geometry.linear())]]
    facts = layer_facts(
        CollectedInputs("0", calls, calls),
        layer,
        BGDConfig(max_divergence=None),
        torch.Generator().manual_seed(0),
        norm="1" if kind == "norm" else None,
        has_bias=kind == "bias",
    )
    rough = facts.weight + 0.1 * torch.randn(facts.weight.shape, generator=torch.Generator().manual_seed(1))
    return facts, Perturbation.of(facts, rough)


@torch.no_grad()
def _outputs(network: nn.Module) -> Tensor:
    return network(_X).double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["norm", "bias", "plain"])
def test_the_weight_has_the_error_and_the_output_keeps_what_is_corrected(kind: str, scale: float) -> None:
    network = _network(kind)
    one = _error(network, kind)[1]
    weight, exact = network.get_submodule("0").weight.detach().clone(), _outputs(network)
    changed = weight + scale * one.error[0].float()
    with perturbed(network, one, scale):
        found = network.get_submodule("0").weight.detach()
        rough = _outputs(network)
    spread = (_X @ weight.T).std(0) / (_X @ changed.T).std(0) if kind == "norm" else torch.ones(8)
    torch.testing.assert_close(found, changed * spread[:, None], rtol=1e-4, atol=1e-6)
    assert float((rough - exact).std() / exact.std()) > 0.05
    if kind == "plain":
        assert float((rough.mean(0) - exact.mean(0)).abs().max()) > 0.01
    else:
        torch.testing.assert_close(rough.mean(0), exact.mean(0), rtol=1e-4, atol=1e-4)
    if kind == "norm":
        torch.testing.assert_close(rough.std(0), exact.std(0), rtol=1e-4, atol=1e-5)


def test_the_ratio_of_spreads_is_bounded() -> None:
    _, one = _error(_network("norm"), "norm")
    torch.testing.assert_close(one.ratio(1e6), torch.full((8,), 0.05))
    torch.testing.assert_close(one.ratio(0.0), torch.ones(8))


@pytest.mark.parametrize("kind", ["norm", "bias", "plain"])
def test_afterwards_everything_is_as_before_also_if_a_run_fails(kind: str) -> None:
    network = _network(kind)
    _, one = _error(network, kind)
    before, tensors = copy.deepcopy(network.state_dict()), dict(network.named_parameters())
    mean = getattr(network.get_submodule("1"), "running_mean", None)
    with pytest.raises(KeyError), perturbed(network, one, 2.0):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter is tensors[name] for name, parameter in network.named_parameters())
    assert getattr(network.get_submodule("1"), "running_mean", None) is mean


def test_the_bias_of_a_function_and_that_of_a_transposed_convolution_stay() -> None:
    """A function's bias is no parameter of its module's, and rows of a transposed convolution are no channels."""
    functional = trace(FunctionalNet().eval())
    found = {layer.name: layer for layer in find_layers(functional)[0]}
    assert bias_of(functional, found["own"]) is None and bias_of(functional, found["matrix"]) is None
    assert bias_of(functional, found["stem"]) is functional.stem.bias
    transposed = trace(nn.Sequential(nn.ConvTranspose2d(4, 6, 2)).eval())
    assert bias_of(transposed, find_layers(transposed)[0][0]) is None


def test_the_error_of_a_functions_weight_is_seen_where_the_function_reads_it() -> None:
    network = copy_module(trace(FunctionalNet().eval()))
    layers = find_layers(network)[0]
    isolate_weights_(network, layers)
    (layer,) = [layer for layer in layers if layer.name == "matrix"]
    x = torch.randn(2, 3, 12, 12)
    calls = [[(torch.randn(50, 16), Geometry.linear())]]
    facts = layer_facts(
        CollectedInputs("matrix", calls, calls),
        layer,
        BGDConfig(max_divergence=None),
        torch.Generator().manual_seed(0),
        norm=None,
        has_bias=False,
    )
    one = Perturbation.of(facts, 2 * facts.weight)
    with torch.no_grad():
        exact = network(x)
        with perturbed(network, one):
            rough = network(x)
        bias = network.get_parameter("bias")
        torch.testing.assert_close(rough - bias, 2 * (exact - bias), rtol=1e-2, atol=1e-2)
        assert torch.equal(network(x), exact)


def test_a_bias_stays_where_nothing_takes_the_mean_out() -> None:
    """As with a method that does not correct biases."""
    network = _network("bias")
    facts, one = _error(network, "bias")
    kept = dataclasses.replace(one, takes_mean=False)
    bias, exact = network.get_submodule("0").bias, _outputs(network)
    with perturbed(network, one):
        assert network.get_submodule("0").bias is not bias
    with perturbed(network, kept):
        assert network.get_submodule("0").bias is bias
        assert float((_outputs(network).mean(0) - exact.mean(0)).abs().max()) > 0.01
    assert facts.takes_mean


def test_a_row_that_gives_nothing_keeps_its_spread() -> None:
    _, one = _error(_network("norm"), "norm")
    nothing = dataclasses.replace(one, powers=torch.zeros_like(one.powers))
    assert torch.equal(nothing.ratio(1.0), torch.ones(8))
    rounded = dataclasses.replace(one, powers=torch.tensor([[-1e-9], [0.0], [0.0]]))
    assert torch.equal(rounded.ratio(1.0), torch.ones(1))
