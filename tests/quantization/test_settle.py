"""The compressed network in a module of the class that went in."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.errors import TraceError
from bgd_plugin.graph import copy_module, front_end
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.quantization.finish import round_to_storage_
from bgd_plugin.quantization.settle import settled, transplanted_into
from tests.networks import PlainNet, em, vectors

BATCHES = [Batch((x,)) for x in vectors()]


class Parts(PlainNet):
    """A norm, a part that evaluation never uses, a second name for a weight, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(8, 8)
        self.alias = [self[0].bias]
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(5):
            x = self[index](x)
        return self.norm(x)  # type: ignore[no-any-return]


class Looks(PlainNet):
    """Its answers turn with the class of a layer, which no graph shows."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return -y if isinstance(self[2], PQModule) else y


def _pair(model: nn.Module, **fields: Any) -> tuple[Any, Any, Any]:
    """A front, its student with a quantized layer, and the survey."""
    front = front_end(model)
    survey = surveyed(front, em(**fields), original=model)
    student: Any = copy_module(front.network, share_tensors=True)
    layer = quantized(copy_module(student.get_submodule("2")), torch.randn(16, 4), torch.randint(0, 16, (32, 8)))
    student.set_submodule("2", layer)
    return front, student, survey


def test_layers_parameters_and_statistics_are_the_students_and_all_else_as_it_came() -> None:
    torch.manual_seed(0)
    front, student, survey = _pair(Parts().eval(), float_storage="float16")
    student.get_submodule("0")._parameters["bias"] = nn.Parameter(torch.ones(32))
    student.get_submodule("norm").running_mean = torch.full((5,), 2.0)
    front.own.runs.fill_(7.0)
    round_to_storage_(student, survey)
    network: Any = settled(front, student, survey, BATCHES)
    assert network is front.own and type(network) is Parts
    assert isinstance(network[2], PQModule) and torch.equal(network[2].codebook, student.get_submodule("2").codebook)
    assert torch.equal(network[0].bias, torch.ones(32)) and network.alias[0] is network[0].bias
    assert torch.equal(network.norm.running_mean, torch.full((5,), 2.0)) and network.runs.item() == 7.0
    assert torch.equal(network.unused.weight, network.unused.weight.half().float())
    again = pickle.loads(pickle.dumps(network))
    assert torch.equal(again(BATCHES[0].args[0]), student(BATCHES[0].args[0]))


def test_a_graph_comes_back_as_the_student() -> None:
    model = fx.symbolic_trace(PlainNet().eval())
    front, student, survey = _pair(model)
    assert settled(front, student, survey, BATCHES) is student
    assert transplanted_into(front.own, student, survey) is student


def test_code_that_a_graph_does_not_show_is_an_error() -> None:
    front, student, survey = _pair(Looks().eval())
    with pytest.raises(
        TraceError, match=r"the compressed Looks does not compute the same as the fitted graph: .* give a Graph"
    ):
        settled(front, student, survey, BATCHES)


def test_a_network_without_a_graph_is_not_compared() -> None:
    class Branching(Looks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.abs().max()) > 0 else x

    front, student, survey = _pair(Branching().eval())
    assert isinstance(settled(front, student, survey, BATCHES).get_submodule("2"), PQModule)
