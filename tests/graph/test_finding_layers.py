"""Finding layers: names, kinds, families, and how a call walks over its input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin.graph import call_geometry, call_input, find_layers, trace
from bgd_plugin.pq.blocks import Geometry
from tests.networks import FunctionalNet, SmallResNet, TwiceNet


def _found(model: nn.Module) -> dict[str, object]:
    return {layer.name: layer for layer in find_layers(trace(model))[0]}


@pytest.mark.parametrize(
    ("layer", "kind", "family"),
    [
        (nn.Linear(8, 4), "linear", "linear"),
        (nn.Conv1d(8, 4, 3), "conv1d", "conv"),
        (nn.Conv2d(8, 4, (1, 3)), "conv2d", "conv"),
        (nn.Conv3d(8, 4, 3), "conv3d", "conv"),
        (nn.Conv2d(8, 4, 1), "conv2d", "pointwise_conv"),
        (nn.Conv2d(8, 4, 1, groups=2), "conv2d", "pointwise_conv"),
        (nn.Conv2d(8, 4, 3, groups=2), "conv2d", "conv"),
        (nn.Conv2d(8, 8, 3, groups=8), "conv2d", "depthwise_conv"),
        (nn.Conv2d(1, 8, 3), "conv2d", "conv"),
    ],
)
def test_kinds_and_families(layer: nn.Module, kind: str, family: str) -> None:
    ((found,), left) = find_layers(trace(nn.Sequential(layer)))
    assert (found.name, found.kind, found.family, found.functional) == ("0", kind, family, False)
    assert found.weight is layer.weight
    assert left == []


def test_a_layer_that_runs_twice_is_found_once_with_both_calls() -> None:
    found = {layer.name: layer.calls for layer in find_layers(trace(TwiceNet()))[0]}
    assert list(found) == ["first", "shared", "last"]
    assert len(found["shared"]) == 2


def test_functional_layers_go_by_the_name_of_their_module_or_parameter() -> None:
    found = {layer.name: layer for layer in find_layers(trace(FunctionalNet()))[0]}
    assert {name: (x.target, x.kind, x.functional) for name, x in found.items()} == {
        "stem": ("stem", "conv2d", False),
        "own": ("own.weight", "conv2d", True),
        "kernel": ("kernel", "conv2d", True),
        "matrix": ("matrix", "linear", True),
    }


def test_a_parameter_that_two_functions_read_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w), self.w)

    ((layer,), _) = find_layers(trace(Twice()))
    assert (layer.name, len(layer.calls)) == ("w", 2)


def test_a_weight_that_something_else_reads_too_is_left_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w) + self.w.sum()

    found, left = find_layers(trace(Both()))
    assert found == []
    assert [(x.name, x.reason) for x in left] == [("w", "its weight is also used by sum")]


def test_modules_that_share_a_weight_are_one_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    ((layer,), left) = find_layers(trace(model))
    assert (layer.name, layer.tied, len(layer.calls)) == ("0", ("1",), 2)
    assert left == []


def test_a_module_whose_weight_a_function_reads_is_left_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.fc.weight)

    found, left = find_layers(trace(Both()))
    assert found == []
    assert all("its weight is also used by" in x.reason for x in left)


def test_strides_that_the_graph_computes_are_left_alone() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, stride=x.shape[0])

    found, left = find_layers(trace(Computed()))
    assert found == []
    assert [(x.name, x.reason) for x in left] == [("w", "its stride, padding or groups are computed in the graph")]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x, w, None, 2, (1, 0), 1, 2),
        lambda x, w: F.conv2d(input=x, weight=w, stride=2, padding=(1, 0), groups=2),
        lambda x, w: F.conv2d(x, w, stride=(2, 2), padding=[1, 0], groups=2, dilation=1),
    ],
)
def test_a_functions_geometry_is_read_from_its_arguments(call: object) -> None:
    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return call(x, self.w)

    graph_module = trace(Calling())
    ((layer,), _) = find_layers(graph_module)
    node = next(n for n in graph_module.graph.nodes if n.name == layer.calls[0])
    assert call_geometry(graph_module, node) == Geometry.of((3, 3), 2, (1, 0), 1, 2)
    assert call_input(node).op == "placeholder"


def test_a_modules_geometry_is_read_from_its_attributes() -> None:
    conv = nn.Conv2d(4, 8, (3, 5), stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect")
    graph_module = trace(nn.Sequential(conv))
    node = next(n for n in graph_module.graph.nodes if n.op == "call_module")
    assert call_geometry(graph_module, node) == Geometry.of((3, 5), 2, 1, 2, 2, "reflect")


def test_the_order_is_that_of_running_not_of_registration() -> None:
    names = [layer.name for layer in find_layers(trace(SmallResNet()))[0]]
    assert names == ["stem", "conv1", "conv2", "down", "fc"]


def test_a_layer_that_is_tied_to_what_has_no_form_stays_with_it_where_there_is_no_graph() -> None:
    network = nn.ModuleDict({"bag": nn.EmbeddingBag(40, 16), "head": nn.Linear(16, 40), "other": nn.Linear(16, 16)})
    network["head"].weight = network["bag"].weight
    found, left = find_layers(network)
    assert [layer.name for layer in found] == ["other"]
    reasons = {layer.name: layer.reason for layer in left}
    assert reasons["head"] == "its weight is also used by 'bag', EmbeddingBag"


def test_a_part_without_weights_does_not_change_a_layers_name() -> None:
    class Padded(nn.Conv2d):
        """A convolution with a forward of its own, as EfficientNet ports have it."""

        def __init__(self) -> None:
            super().__init__(3, 8, 3)
            self.static_padding = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.static_padding(x), self.weight, self.bias)

    found, _ = find_layers(trace(nn.Sequential(Padded()).eval()))
    assert [layer.name for layer in found] == ["0"]
