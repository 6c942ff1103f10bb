"""A parameter that a module computes, under its own name or under that of the module."""

from __future__ import annotations

import torch
from torch import nn

from bgd_plugin.graph.computed import compute_parameter_, loosen_parameter_, restore_parameter_
from bgd_plugin.nn import FloatWeight


def test_a_computed_parameter_can_be_loosened_and_computed_again() -> None:
    layer, other = nn.Bilinear(3, 4, 5), nn.Bilinear(3, 4, 5)
    kind, weight = type(layer), layer.weight
    computing = FloatWeight(weight)
    inputs = torch.randn(2, 3), torch.randn(2, 4)
    expected = layer(*inputs)
    compute_parameter_(layer, "weight", computing)
    names = list(layer.state_dict())
    loosen_parameter_(layer, "weight")
    assert type(layer) is kind
    assert layer.get_submodule("weight") is computing and list(layer.state_dict()) == names
    compute_parameter_(layer, "weight", computing)
    assert torch.equal(layer(*inputs), expected) and layer.weight is weight
    restore_parameter_(layer, "weight", weight)
    assert type(layer) is kind and dict(layer.named_parameters()).keys() == dict(other.named_parameters()).keys()
    assert torch.equal(layer(*inputs), expected)


def test_of_two_computed_parameters_one_can_be_loosened() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True).eval()
    computing = {name: FloatWeight(getattr(layer, name)) for name in ("q_proj_weight", "k_proj_weight")}
    for name, module in computing.items():
        compute_parameter_(layer, name, module)
    loosen_parameter_(layer, "k_proj_weight")
    assert layer.q_proj_weight is computing["q_proj_weight"].weight
    assert layer.get_submodule("k_proj_weight") is computing["k_proj_weight"]
