"""Quantization as one pass among others."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import bgd_plugin as bgd
from bgd_plugin import BGDPass
from bgd_plugin.errors import ConfigError
from bgd_plugin.nn import PQLinear
from tests.networks import PlainNet, SmallResNet, em, images, randomized, same_outputs, vectors


class _Double(PassBase):
    """A pass of someone else: doubles the first layer's bias, in the graph's module."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        with torch.no_grad():
            graph_module.get_parameter("0.bias").mul_(2)
        return PassResult(graph_module, True)


def test_it_gives_what_quantize_gives() -> None:
    model = randomized(SmallResNet())
    result = BGDPass(em(), images(), progress=False)(fx.symbolic_trace(model))
    assert isinstance(result, PassResult)
    assert result.modified
    assert same_outputs(result.graph_module, bgd.quantize(model, images(), em(), progress=False).model, images())


def test_it_stands_in_a_pass_manager_next_to_others() -> None:
    model = PlainNet()
    bias = model[0].bias.detach().clone()
    ours = BGDPass(em(), vectors(), progress=False)
    result = PassManager(passes=[_Double(), ours, _Double()])(fx.symbolic_trace(model))
    assert isinstance(result.graph_module.get_submodule("2"), PQLinear)
    assert torch.equal(result.graph_module.get_parameter("0.bias"), 4 * bias)


def test_it_may_run_more_than_once() -> None:
    ours = BGDPass(em(), vectors(), progress=False)
    once = PassManager(passes=[ours])(fx.symbolic_trace(PlainNet())).graph_module
    again = PassManager(passes=[BGDPass(em(), vectors(), progress=False)], steps=2)(fx.symbolic_trace(PlainNet()))
    assert isinstance(again.graph_module.get_submodule("2"), PQLinear)
    assert isinstance(once.get_submodule("2"), PQLinear)


def test_a_graph_with_nothing_left_to_do_comes_out_unmodified() -> None:
    first = BGDPass(em(first_layer=bgd.LayerConfig(block_size=4)), vectors(), progress=False)
    done = first(fx.symbolic_trace(PlainNet())).graph_module
    second = BGDPass(em(), vectors(), progress=False)
    result = second(done)
    assert result.graph_module is done
    assert not result.modified
    assert second.report is None


def test_a_quantized_graph_whose_float_rest_is_left_on_purpose_comes_out_unmodified() -> None:
    """The first layer stays float in a first pass: a second one with the same settings has nothing to do."""
    ours = BGDPass(em(overrides=(("0", None),)), vectors(), progress=False)
    done = ours(fx.symbolic_trace(PlainNet())).graph_module
    result = ours(done)
    assert not result.modified
    assert result.graph_module is done


def test_it_keeps_the_report() -> None:
    ours = BGDPass(em(), vectors(), progress=False)
    assert ours.report is None
    ours(fx.symbolic_trace(PlainNet()))
    assert ours.report is not None
    assert [layer.name for layer in ours.report.layers] == ["2", "4"]


def test_it_asks_for_a_graph_module() -> None:
    with pytest.raises(ConfigError, match="BGDPass works on a GraphModule, found Linear: trace the network first"):
        BGDPass(em(), vectors())(nn.Linear(12, 4))
