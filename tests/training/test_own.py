"""A network that is trained has tensors of its own, and its ties."""

from __future__ import annotations

import torch
from torch import nn

from bgd_plugin.graph import copy_module
from bgd_plugin.training.own import own_parameters_


def test_values_and_flags_stay_and_no_storage_is_shared() -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other[0].weight.requires_grad_(False)
    network = copy_module(other, share_tensors=True)
    own_parameters_(network)
    for (name, mine), (_, theirs) in zip(network.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr(), name
        assert mine.requires_grad == theirs.requires_grad


def test_tied_parameters_stay_one() -> None:
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    network[1].weight = network[0].weight
    old = network[0].weight
    own_parameters_(network)
    assert network[0].weight is network[1].weight is not old


def test_a_recurrent_layer_runs_on_its_new_parameters() -> None:
    layer = nn.LSTM(3, 4)
    own_parameters_(layer)
    layer(torch.ones(2, 1, 3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
